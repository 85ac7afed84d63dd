"""A finished checkpoint, read back: what it holds, and whether it is whole."""
