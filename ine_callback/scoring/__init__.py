"""Directions of queries and their inner products with the rows' gradients."""
