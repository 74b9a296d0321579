"""Curvature of the loss: factors gathered over the run, and what functions of them act on directions."""
