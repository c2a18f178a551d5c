"""Documents read once and served for days: a library on disk, requests that decode together."""
