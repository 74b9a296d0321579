"""The gradient store: what the run did with each row, in few bytes, for queries that come later."""
