"""Do scores foretell retraining? Halves of the rows and single rows left out, beside dattri and traker."""
