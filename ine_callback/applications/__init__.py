"""What users do with scores: rows to drop, labels to check, weights for the next training."""
