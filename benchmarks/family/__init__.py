"""A family of protocols with retrained truth: one training setting is no evidence for another."""
