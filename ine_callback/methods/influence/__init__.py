"""Influence functions of a trained model: IF, its curvature, its solvers."""
