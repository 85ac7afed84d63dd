"""Which input channel goes where: dealt, assigned or learned."""
