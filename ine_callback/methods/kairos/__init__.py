"""KAIROS: values of training rows by how they move the training set towards a clean reference; no model needed."""
