"""What is compared on a GPU, one layer and a whole generation; imports torch alone."""
