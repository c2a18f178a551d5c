"""What is held: the ragged store of one layer, attention over it, and its file format."""
