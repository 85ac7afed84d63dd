"""What a prune will make of a model, and what it will take: bytes, time and speed."""
