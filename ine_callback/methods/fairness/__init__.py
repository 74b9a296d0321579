"""Fair subspaces: which directions of the features tell about a sensitive attribute, and what leaving them out costs."""
