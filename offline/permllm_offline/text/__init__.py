"""Text: read, cut into windows, sampled from a model; and what a model makes of it."""
