"""Experts on a GPU, compared with float64 products in memory that is full of NaN."""

import torch
from torch.nn.functional import gelu, silu

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.layers import replace
from tests.cuda.on_gpu import CUDA, poisoned_memory

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4}  # four roundings: 3.8e-3 and 4.7e-4
ENOUGH = 2000  # results over which they average out; of fewer, twice as much
ACTIVATIONS = ("silu", "gelu", "relu2")  # by number
DISTINCT = 4  # experts that are drawn


class Experts:
    """Experts on the GPU: packed, and dense in float64."""

    def __init__(
        self,
        experts,
        hidden,
        inner,
        dtype=torch.bfloat16,
        *,
        make=random_layer,
        seed=0,
        activation="silu",
    ):
        self.inner, self.dtype, self.activation = inner, dtype, activation
        self.operands, self.dense = [], []
        outputs = inner if activation == "relu2" else 2 * inner
        for n, k in ((outputs, hidden), (hidden, inner)):
            layers = [
                make(n, k, permuted=k % 64 == 0, seed=seed + number) for number in range(DISTINCT)
            ]
            backend = CudaBackend(dtype)
            packed = [backend.pack(_moved(layer.weights)) for layer in layers]
            of_experts = [number % DISTINCT for number in range(experts)]
            self.operands += vars(backend.stack([packed[one] for one in of_experts])).values()
            dense = [layer.dense.to(CUDA).double() for layer in layers]
            self.dense.append([dense[one] for one in of_experts])

    def __call__(self, x, weights, ids):
        return torch.ops.permllm.sparse_experts(
            x, weights, ids, *self.operands, self.inner, ACTIVATIONS.index(self.activation)
        )

    def between(self, products):
        """What stands between the two products."""
        if self.activation == "relu2":
            return products.relu() ** 2
        gate, up = products.chunk(2, dim=1)
        return (silu(gate) if self.activation == "silu" else gelu(gate, approximate="tanh")) * up

    def exact(self, x, weights, ids):
        y = torch.zeros(x.shape, dtype=torch.float64, device=CUDA)
        for expert, (gate_up, down) in enumerate(zip(*self.dense, strict=True)):
            tokens, choices = torch.where(ids == expert)
            outputs = self.between(x[tokens].double() @ gate_up.t()) @ down.t()
            y.index_add_(0, tokens, outputs * weights[tokens, choices, None].double())
        return y

    def check(self, x, weights, ids):
        with poisoned_memory():
            y = self(x, weights, ids)
        exact = self.exact(x, weights, ids)
        assert y.dtype == x.dtype
        assert y.isfinite().all()
        error = (y.double() - exact).norm() / exact.norm()
        limit = TOLERANCE[x.dtype] * (1 if y.numel() >= ENOUGH else 2)
        assert error < limit, f"relative Frobenius error {error:.2e}"


def _moved(weights):
    tensors = {name: part.to(CUDA) for name, part in vars(weights).items() if torch.is_tensor(part)}
    return replace(weights, **tensors)


def routed(tokens, choices, experts):
    weights, ids = torch.rand(tokens, experts, device=CUDA).topk(choices, dim=1)
    return weights, ids.to(torch.int32)
