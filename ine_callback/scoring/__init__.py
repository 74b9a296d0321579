"""Directions of queries, and signals: their inner products with the rows' gradient contributions."""
