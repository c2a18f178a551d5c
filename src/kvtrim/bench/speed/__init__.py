"""Seconds and bytes of prefill and decoding, beside plain transformers."""
