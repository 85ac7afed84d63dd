"""What is measured on the dense model before anything is pruned."""
