"""Looking at what was measured: plots."""
