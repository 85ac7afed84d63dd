"""One module for each sub-command: options in, calls out, no arithmetic."""
