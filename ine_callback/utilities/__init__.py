"""Tools without a topic: isolation, options, wording."""
