"""AirRep: an encoder of rows whose inner products say what training on a subset does to a query (arXiv 2505.18513)."""
