"""What is compared on a CPU: dense peers, limits of the machine, rows and tables of kernels."""
