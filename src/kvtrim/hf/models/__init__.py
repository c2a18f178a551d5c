"""Models: loading them, what kvtrim reads off them, whether it works on them."""
