"""Any training run: each regime is checked for its scores, for the training left as it was, and for lost rows."""
