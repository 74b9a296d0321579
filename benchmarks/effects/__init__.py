"""Effects measured: variances over adjustment sets, coverage, other packages."""
