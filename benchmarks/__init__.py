"""Measurements of ine_callback against retraining; the results are in RESULTS.md."""
