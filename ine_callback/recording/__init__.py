"""The flow of a training step, and what is stored of it for every row."""
