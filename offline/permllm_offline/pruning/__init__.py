"""Prune a model: in memory, or one decoder layer at a time."""
