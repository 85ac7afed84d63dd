"""The Hugging Face model: what its parts are called, how they are read and called."""
