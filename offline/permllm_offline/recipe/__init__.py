"""The choices of a prune: methods, presets, and the recipe that records them."""
