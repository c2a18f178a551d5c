"""Analyses of papers, redrawn on any model: what is in a prompt's attention, keys and values."""
