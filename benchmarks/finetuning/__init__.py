"""Fine-tuning a small language model from fixed weights (protocol FT): do one run's scores foretell retraining?"""
