"""Shared tools without a place of their own: isolation, options."""
