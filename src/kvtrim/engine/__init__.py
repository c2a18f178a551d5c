"""One generation: what was read, what is due, what stays. Free of transformers."""
