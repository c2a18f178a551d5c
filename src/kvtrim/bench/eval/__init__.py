"""An evaluation: every sample of every task under every method and budget; no figure twice."""
