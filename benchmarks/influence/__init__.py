"""Influence functions at the trained weights: calibration, halves left out, samplers, solvers, other libraries."""
