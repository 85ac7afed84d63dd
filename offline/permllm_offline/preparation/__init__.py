"""From what a user gives to a prune that is checked against its model and its data."""
