"""What a prune says of itself: numbers, page, plots and model card."""
