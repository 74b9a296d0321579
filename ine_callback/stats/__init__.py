"""Trade-off functions, nulls and tests: plain numbers in, plain numbers out (numpy and SciPy only)."""
