"""Connects the recording to other programs: Lightning, Hugging Face, loggers, the environment."""
