"""A long run: its steps, kept to go on from, their costs, and its processes."""
