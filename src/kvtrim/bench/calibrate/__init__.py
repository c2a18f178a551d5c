"""What a method needs to have measured once per model."""
