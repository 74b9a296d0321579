"""The flow of a training step as a state machine, and what is kept of it."""
