"""Layers on a GPU, compared with float64 products in memory that is full of NaN."""

import contextlib

import torch

from permllm_vllm import ops
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.layers import replace

CUDA = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 6e-4}  # the rounding of y gives most of it
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
ENOUGH = 64  # results over which roundings average out: of one alone, its own may be the error
SUMS = 2**-14  # of sums in float32, of the sum of all magnitudes
SMALLEST = 2**-24  # of float16


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

    def exact(self, x):
        y = x.double() @ self.dense.t()
        return y if self.bias is None else y + self.bias.double()

    def check(self, x):
        with poisoned_memory():
            y = self(x)
        self.compare(x, y)

    def compare(self, x, y):
        exact = self.exact(x)
        assert y.dtype == x.dtype
        assert y.shape == exact.shape
        assert y.isfinite().all()
        if y.numel() >= ENOUGH:
            error = (y.double() - exact).norm() / exact.norm().clamp_min(1e-30)
            assert error < TOLERANCE[x.dtype], f"relative Frobenius error {error:.2e}"
        size = x.double().abs() @ self.dense.abs().t()
        bound = ROUNDING[x.dtype] * exact.abs() + SUMS * size + SMALLEST
        assert ((y.double() - exact).abs() <= bound).all()
