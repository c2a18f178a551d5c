"""Reads what measurements wrote, and draws it. Knows nothing of models."""
