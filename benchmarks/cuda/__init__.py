"""What is compared on a GPU, a layer, experts and a whole generation; imports torch alone."""

INCOMPLETE = 75
"""Exit status of a benchmark that left something out that it was asked for."""
