"""Scoring rules, one file each."""
