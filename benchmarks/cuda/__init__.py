"""The benchmark of one layer on a GPU; imports torch alone."""
