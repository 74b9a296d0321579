"""Influence functions at the trained weights: calibration, retraining without halves, samplers, solvers, other libraries."""
