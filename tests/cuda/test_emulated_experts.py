"""The kernels for experts on an emulated GPU, against loops in float64."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.shapes import Layer, random_layer
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.backends.weights import StackedWeights
from tests.cuda.emulated import A100, H100, L4, SMALL, Emulator, Gpu
from tests.cuda.layers import int8_layer
from tests.kernels.test_experts import GELU_TANH, RELU2, error, oracle

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 8e-4}  # four roundings
DTYPES = (torch.bfloat16, torch.float16)


def layers(
    experts: int,
    hidden: int,
    inner: int,
    *,
    int8: bool = False,
    block_size: int = 64,
    gated: bool = True,
) -> tuple[list[Layer], list[Layer]]:
    """Gate and up, or what is activated alone, and down, of every expert."""

    def layer(n: int, k: int, seed: int) -> Layer:
        make = int8_layer if int8 else random_layer
        permuted = k % block_size == 0
        return make(n, k, block_size=block_size, permuted=permuted, seed=seed)

    return (
        [layer((2 if gated else 1) * inner, hidden, 2 * expert) for expert in range(experts)],
        [layer(hidden, inner, 2 * expert + 1) for expert in range(experts)],
    )


def stacked(experts: Sequence[Layer], dtype: torch.dtype) -> StackedWeights:
    backend = CudaBackend(dtype)
    return backend.stack([backend.pack(layer.weights) for layer in experts])


def inputs(tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def routed(tokens: int, choices: int, experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens + choices)
    weights, ids = torch.rand(tokens, experts, generator=generator).topk(choices, dim=-1)
    return weights, ids.to(torch.int32)


def check(
    emulator: Emulator,
    shape: tuple[int, int, int],
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    *,
    int8: bool = False,
    block_size: int = 64,
    gpu: Gpu = SMALL,
    seed: int = 0,
    activation: int = 0,
) -> tuple[Tensor, int]:
    gated = activation != RELU2
    gate_up, down = layers(*shape, int8=int8, block_size=block_size, gated=gated)
    y, blocks = emulator.experts(
        x, weights, ids, stacked(gate_up, x.dtype), stacked(down, x.dtype), shape[2],
        activation, gpu=gpu, seed=seed,
    )  # fmt: skip
    expected = oracle(x, weights, ids, gate_up, down, activation)
    assert y.isfinite().all()
    assert error(y, expected) < TOLERANCE[x.dtype]
    return y, blocks


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40, 170])  # of 170, blocks hold 128 pairs
def test_is_the_sum_of_its_experts(emulator: Emulator, tokens: int, int8: bool) -> None:
    x = inputs(tokens, 192, DTYPES[tokens % 2])
    check(emulator, (5, 192, 64), x, *routed(tokens, 2, 5), int8=int8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(emulator: Emulator, dtype: torch.dtype) -> None:
    x = inputs(7, 192, dtype)
    check(emulator, (5, 192, 64), x, *routed(7, 2, 5), activation=GELU_TANH)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("tokens", [1, 40, 170])
def test_without_a_gate(emulator: Emulator, tokens: int, int8: bool) -> None:
    x = inputs(tokens, 192, DTYPES[tokens % 2])
    routes = routed(tokens, 2, 5)
    check(emulator, (5, 192, 64), x, *routes, int8=int8, activation=RELU2)


@settings(max_examples=10)
@given(
    experts=st.integers(1, 9),
    hidden=st.integers(1, 40).map(lambda eighths: eighths * 8),
    inner=st.integers(1, 24).map(lambda eighths: eighths * 8),
    tokens=st.integers(1, 30),
    choices=st.integers(1, 4),
    block_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(DTYPES),
    gpu=st.sampled_from([A100, H100, L4]),
)
def test_of_any_shape(
    emulator: Emulator,
    experts: int,
    hidden: int,
    inner: int,
    tokens: int,
    choices: int,
    block_size: int,
    dtype: torch.dtype,
    gpu: Gpu,
) -> None:
    routes = routed(tokens, min(choices, experts), experts)
    x = inputs(tokens, hidden, dtype)
    check(emulator, (experts, hidden, inner), x, *routes, block_size=block_size, gpu=gpu)


@pytest.mark.parametrize(
    ("tokens", "choices", "experts", "blocks"),
    [
        (4, 1, 4, 1),  # of 8 pairs
        (9, 1, 1, 1),  # of 16
        (70, 1, 2, 2),  # of 64
        (40, 3, 12, 6),  # of 32: 10 pairs to an expert on average
        (70, 1, 1, 1),  # of 128
        (129, 1, 2, 2),
    ],
)
def test_blocks_of_pairs(
    emulator: Emulator, tokens: int, choices: int, experts: int, blocks: int
) -> None:
    """All tokens want the first experts: two blocks to one that has more than a block holds."""
    weights = torch.rand(tokens, choices)
    ids = torch.arange(choices, dtype=torch.int32).repeat(tokens, 1)
    x = inputs(tokens, 128, torch.bfloat16)
    assert check(emulator, (experts, 128, 64), x, weights, ids)[1] == blocks


def test_as_many_blocks_as_there_may_be(emulator: Emulator) -> None:
    """Every expert but one has a single pair, the last all others: each block is needed."""
    ids = torch.tensor([[0], [1], [2], *[[3]] * 9], dtype=torch.int32)
    x = inputs(12, 128, torch.bfloat16)
    _, blocks = check(emulator, (4, 128, 64), x, torch.rand(12, 1), ids)
    assert blocks == 5


@pytest.mark.parametrize("elsewhere", [-1, 4, 2**31 - 1, -(2**31)])
def test_experts_elsewhere_add_nothing(emulator: Emulator, elsewhere: int) -> None:
    weights, ids = routed(6, 2, 4)
    ids[1, 0] = ids[4, 0] = ids[4, 1] = elsewhere
    gate_up, down = layers(4, 128, 64)
    x = inputs(6, 128, torch.bfloat16)
    y, _ = emulator.experts(x, weights, ids, stacked(gate_up, x.dtype), stacked(down, x.dtype), 64)
    known = torch.where((ids >= 0) & (ids < 4), ids, -1)
    expected = oracle(x, weights, known, gate_up, down)
    assert error(y, expected) < TOLERANCE[x.dtype]
    assert not y[4].any()


def repeated(experts: StackedWeights, times: int) -> StackedWeights:
    """The same experts over and over."""
    parts = vars(experts).values()
    return StackedWeights(
        *(part if part is None else part.repeat(times, *[1] * (part.dim() - 1)) for part in parts)
    )


def test_the_most_experts(emulator: Emulator) -> None:
    """The last of 1024 among them."""
    gate_up, down = layers(2, 128, 64)
    many = [repeated(stacked(layer, torch.bfloat16), 512) for layer in (gate_up, down)]
    x, weights = inputs(3, 128, torch.bfloat16), torch.rand(3, 2)
    ids = torch.tensor([[0, 1023], [511, 512], [1022, 3]], dtype=torch.int32)
    y, blocks = emulator.experts(x, weights, ids, *many, 64)
    assert blocks == 6
    assert error(y, oracle(x, weights, ids % 2, gate_up, down)) < TOLERANCE[x.dtype]


def test_rows_of_a_wider_tensor(emulator: Emulator) -> None:
    wide = inputs(6, 3 * 128, torch.bfloat16)
    check(emulator, (3, 128, 64), wide[:, 128:256], *routed(6, 2, 3))


def test_the_order_of_threads_does_not_matter(emulator: Emulator) -> None:
    """Which pair comes first differs; no byte of the result does."""
    x, routes = inputs(20, 128, torch.bfloat16), routed(20, 3, 5)
    first, *others = (
        check(emulator, (5, 128, 64), x, *routes, seed=seed * 10000)[0] for seed in range(4)
    )
    assert all(torch.equal(first, other) for other in others)


def test_a_token_does_not_depend_on_its_neighbours(emulator: Emulator) -> None:
    gate_up, down = (stacked(layer, torch.bfloat16) for layer in layers(3, 128, 64))
    x, (weights, ids) = inputs(5, 128, torch.bfloat16), routed(5, 2, 3)
    y, _ = emulator.experts(x, weights, ids, gate_up, down, 64)
    x[1:] = float("nan")
    assert torch.equal(emulator.experts(x, weights, ids, gate_up, down, 64)[0][0], y[0])
