"""Fair subspaces: directions of the features that tell about a sensitive attribute, and what leaving them out costs."""
