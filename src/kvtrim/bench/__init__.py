"""Measuring: what was run on what, seconds and bytes."""
