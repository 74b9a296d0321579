"""What a gradient store keeps: see __main__.py."""
