"""Which weights are kept: their scores, N:M masks, and the tensors that come of them."""
