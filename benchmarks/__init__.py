"""Measurements: kernels, serving, accuracy."""
