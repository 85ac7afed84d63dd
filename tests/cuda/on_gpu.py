"""Layers on a GPU, compared with float64 products in memory that is full of NaN."""

import contextlib

import torch

from permllm_vllm import ops
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.layers import replace
from tests.cuda.rounding import assert_right, exact_product

CUDA = torch.device("cuda")


@contextlib.contextmanager
def poisoned_memory():
    """PyTorch fills what it allocates with NaN, by kernels of its own in front of ours."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class OnGpu:
    """A layer on the GPU: packed, and dense in float64."""

    def __init__(self, layer, dtype):
        weights = layer.weights
        tensors = {
            name: value.to(CUDA) for name, value in vars(weights).items() if torch.is_tensor(value)
        }
        self.packed = CudaBackend(dtype).pack(replace(weights, **tensors))
        dense = layer.dense if weights.scale is not None else layer.dense.to(dtype)
        self.dense = dense.double().to(CUDA)
        self.bias = None if layer.bias is None else layer.bias.to(CUDA, dtype)

    def __call__(self, x):
        rows = self.dense.shape[0]
        packed = self.packed
        return ops.sparse_linear(
            x, packed.packed, packed.metadata, packed.permutation, packed.scale, self.bias, rows,
            "2:4",
        )  # fmt: skip

    def check(self, x):
        with poisoned_memory():
            y = self(x)
        self.compare(x, y)

    def exact(self, x):
        return exact_product(x, self.dense, self.bias)

    def compare(self, x, y):
        assert_right(y, x, self.dense, self.bias)
