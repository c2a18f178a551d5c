"""Attention over the store: a slow reference and the fast paths, one file each."""
