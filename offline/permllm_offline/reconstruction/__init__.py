"""Reconstruction: adjust the kept weights so that the pruned model answers like the dense one."""
