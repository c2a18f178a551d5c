"""Evaluations over several models, protocols and lengths, in pieces for many workers."""
