"""A long run and its machine: steps that are kept, costs, processes, device, memory and paths."""
