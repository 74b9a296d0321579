"""Batches of any structure as rows, and which dataset row each of them is."""
