"""Where the package meets other programs: Lightning, Hugging Face, loggers, the environment."""
