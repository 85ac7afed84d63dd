"""Prunes under measurement: checkpoints, their costs, and the dense loop of the paper."""
