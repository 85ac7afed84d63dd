"""A long run and its machine: kept steps, costs, schedules, processes, device, memory, paths."""
