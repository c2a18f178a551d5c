"""The version, alone in its file so that nothing is imported to read it."""

VERSION = "0.1.0"
