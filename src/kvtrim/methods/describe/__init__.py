"""What there is to say about every method, read off the registry and the docstrings."""
