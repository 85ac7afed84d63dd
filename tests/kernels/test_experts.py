"""Experts: the operator against loops in float64, on every instruction set that this CPU runs."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer, to_int4, to_int8
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.backends.weights import StackedWeights
from tests.kernels.cases import LANES, TWELVE_BITS
from tests.kernels.test_activations import serves
from tests.kernels.test_int8 import SPLIT_TOKENS

EXPERTS, CHOICES = 5, 2
HIDDEN, INTERMEDIATE = 256, 128
MOST_PAIRS = 2048
"""Rows that the kernel holds at a time, and tokens of a call (csrc/cpu/tuning.h)."""
VALUE_TYPE = 5
"""Field of the metadata of an expert (csrc/cpu/packing/layout.h)."""
BFLOAT16 = 0
"""Number of a kind of values (csrc/cpu/packing/layout.h)."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SILU, GELU_TANH, RELU2 = 0, 1, 2
"""Numbers of the activation (csrc/activation.h)."""


def layers(
    values: str = "bfloat16",
    block_size: int = 64,
    *,
    gated: bool = True,
    patterns: Sequence[str] = ("2:4",),
) -> tuple[list[Layer], list[Layer]]:
    """Gate and up, or what is activated alone, and down, of experts whose patterns alternate."""
    shapes = ((2 if gated else 1) * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    gate_up, down = (
        [
            random_layer(n, k, patterns[e % len(patterns)], block_size, seed=100 * n + e)
            for e in range(EXPERTS)
        ]
        for n, k in shapes
    )
    if values == "bfloat16":
        return gate_up, down
    kinds = [to_int8, to_int8 if values == "int8" else to_int4]
    gate_up, down = ([kinds[e % 2](own[e]) for e in range(EXPERTS)] for own in (gate_up, down))
    return gate_up, down


def stacked(backend: CpuBackend, experts: Sequence[Layer]) -> StackedWeights:
    return backend.stack([backend.pack(layer.weights) for layer in experts])


def routed(tokens: int) -> tuple[Tensor, Tensor]:
    """Weights and ids of a router; the last expert is chosen by none."""
    generator = torch.Generator().manual_seed(tokens)
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator)
    weights, ids = scores.topk(CHOICES, dim=-1)
    return weights, ids.to(torch.int32)


def inputs(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1))


def between(products: Tensor, activation: int) -> Tensor:
    """What experts do between their products: of `[..., outputs of the first]` the inputs of down.

    In float64, as the papers have it.
    """
    if activation == RELU2:
        return products.relu() ** 2
    gate, up = products.chunk(2, dim=-1)
    return activated(gate, activation) * up


def activated(gate: Tensor, activation: int) -> Tensor:
    if activation == SILU:
        return gate / (1 + torch.exp(-gate))
    return gate / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))


def oracle(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: Sequence[Layer],
    down: Sequence[Layer],
    activation: int = SILU,
) -> Tensor:
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            if expert < 0:
                continue
            inner = between(gate_up[expert].dense.double() @ row, activation)
            y[token] += weight * (down[expert].dense.double() @ inner)
    return y


def operands(gate_up: StackedWeights, down: StackedWeights) -> list[Any]:
    tensors = [
        operand
        for stack in (gate_up, down)
        for operand in (stack.packed, stack.metadata, stack.permutation, stack.scale)
    ]
    return [*tensors, INTERMEDIATE]


def multiply(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    gate_up: StackedWeights,
    down: StackedWeights,
    activation: int = SILU,
) -> Tensor:
    y: Tensor = torch.ops.permllm.sparse_experts(
        x, weights, ids, *operands(gate_up, down), activation
    )
    return y


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int8 and int4"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("patterns", [("2:4",), ("2:4", "4:8")], ids="+".join)
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_is_the_sum_of_its_experts(
    isa: str, values: str, block_size: int, patterns: tuple[str, ...], tokens: int
) -> None:
    """Of blocks and values that differ from expert to expert too, as on avx2."""
    gate_up, down = layers(values, block_size, patterns=patterns)
    backend = CpuBackend(isa)
    x, (weights, ids) = inputs(tokens).bfloat16(), routed(tokens)
    y = multiply(x, weights, ids, stacked(backend, gate_up), stacked(backend, down))
    assert y.dtype == torch.bfloat16
    rounded = values != "bfloat16" and isa in SPLIT_TOKENS
    rounded = rounded and (tokens > CHOICES or (isa in LANES and "int4" in values))
    expected = oracle(x, weights, ids, gate_up, down)
    assert error(y, expected) < (2.5e-2 if rounded else 6e-3)  # measured 1.7e-2 and 4.8e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu(isa: str, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and not serves(isa, dtype):
        pytest.skip(f"the kernels of {isa} take activations of 16 bits alone")
    gate_up, down = layers()
    backend = CpuBackend(isa)
    x, (weights, ids) = inputs(7).to(dtype), routed(7)
    y = multiply(x, weights, ids, stacked(backend, gate_up), stacked(backend, down), GELU_TANH)
    expected = oracle(x, weights, ids, gate_up, down, GELU_TANH)
    bound = 1e-6 if dtype == torch.float32 else 6e-3
    assert error(y, expected) < bound
    assert error(oracle(x, weights, ids, gate_up, down), expected) > 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_without_a_gate(isa: str, dtype: torch.dtype, values: str, tokens: int) -> None:
    if dtype == torch.float32 and not serves(isa, dtype):
        pytest.skip(f"the kernels of {isa} take activations of 16 bits alone")
    up, down = layers(values, gated=False)
    backend = CpuBackend(isa)
    x, (weights, ids) = inputs(tokens).to(dtype), routed(tokens)
    y = multiply(x, weights, ids, stacked(backend, up), stacked(backend, down), RELU2)
    rounded = values == "int8" and isa in SPLIT_TOKENS and tokens > CHOICES
    exact = dtype == torch.float32 and not rounded
    bound = 1e-6 if exact else 3.5e-2 if rounded else 8e-3
    assert error(y, oracle(x, weights, ids, up, down, RELU2)) < bound


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("tokens", [1, 40])
def test_other_activations(isa: str, dtype: torch.dtype, tokens: int) -> None:
    if dtype == torch.float32 and not serves(isa, dtype):
        pytest.skip(f"the kernels of {isa} take activations of 16 bits alone")
    gate_up, down = layers()
    backend = CpuBackend(isa)
    x, (weights, ids) = inputs(tokens).to(dtype), routed(tokens)
    y = multiply(x, weights, ids, stacked(backend, gate_up), stacked(backend, down))
    assert y.dtype == dtype
    bound = 1e-6 if dtype == torch.float32 else 6e-3
    assert error(y, oracle(x, weights, ids, gate_up, down)) < bound


def exact(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Sequence[Layer], down: Sequence[Layer]
) -> Tensor:
    """As `oracle`, for many tokens: one expert after the other."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(EXPERTS):
        tokens, places = torch.where(ids == expert)
        gate, up = (x[tokens].double() @ gate_up[expert].dense.double().T).chunk(2, dim=1)
        gated = gate / (1 + torch.exp(-gate)) * up
        products = gated @ down[expert].dense.double().T
        y.index_add_(0, tokens, products * weights[tokens, places, None].double())
    return y


def test_more_rows_than_are_in_memory_at_a_time(isa: str) -> None:
    gate_up, down = layers()
    backend = CpuBackend(isa)
    x, (weights, ids) = inputs(MOST_PAIRS + 100).bfloat16(), routed(MOST_PAIRS + 100)
    y = multiply(x, weights, ids, stacked(backend, gate_up), stacked(backend, down))
    expected = exact(x, weights, ids, gate_up, down)
    assert error(y, expected) < 6e-3
    worst = (y.double() - expected).norm(dim=1) / expected.norm(dim=1)
    assert worst.max() < 5e-2


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(isa: str, threads: int) -> None:
    gate_up, down = (stacked(CpuBackend(isa), experts) for experts in layers("int8"))
    for tokens in (1, 40):
        x, (weights, ids) = inputs(tokens).bfloat16(), routed(tokens)
        alone = multiply(x, weights, ids, gate_up, down)
        torch.set_num_threads(threads)
        together = multiply(x, weights, ids, gate_up, down)
        torch.set_num_threads(1)
        assert torch.equal(together, alone)


def test_experts_elsewhere_are_left_out(isa: str) -> None:
    gate_up, down = layers()
    backend = CpuBackend(isa)
    packed = stacked(backend, gate_up), stacked(backend, down)
    x, (weights, ids) = inputs(5).bfloat16(), routed(5)
    ids[ids == 1] = -1
    ids[4] = -1
    y = multiply(x, weights, ids, *packed)
    assert error(y, oracle(x, weights, ids, gate_up, down)) < 6e-3
    assert torch.equal(y[4], torch.zeros(HIDDEN, dtype=torch.bfloat16))
    assert not multiply(x, weights, torch.full_like(ids, -1), *packed).any()


def test_an_expert_that_is_chosen_twice(isa: str) -> None:
    """The last one, whose weight ends where the stack does."""
    gate_up, down = layers()
    packed = [stacked(CpuBackend(isa), experts) for experts in (gate_up, down)]
    for tokens in (1, 3):
        x, (weights, _) = inputs(tokens).bfloat16(), routed(tokens)
        ids = torch.full((tokens, CHOICES), EXPERTS - 1, dtype=torch.int32)
        y = multiply(x, weights, ids, *packed)
        assert error(y, oracle(x, weights, ids, gate_up, down)) < 6e-3


def test_rows_with_strides(isa: str) -> None:
    gate_up, down = (stacked(CpuBackend(isa), experts) for experts in layers())
    wide, (weights, ids) = torch.randn(6, 2 * HIDDEN).bfloat16(), routed(6)
    x = wide[:, :HIDDEN]
    y = multiply(x, weights, ids, gate_up, down)
    assert torch.equal(y, multiply(x.contiguous(), weights, ids, gate_up, down))
    assert multiply(x[:0], weights[:0], ids[:0], gate_up, down).shape == (0, HIDDEN)


@pytest.mark.parametrize("isa", TWELVE_BITS)
def test_values_that_have_no_twelve_bits(isa: str) -> None:
    """Of one expert, whose weight is packed in 16 bits beside those of the others."""
    if isa not in instruction_sets():
        pytest.skip(f"this CPU or build does not run {isa}")
    gate_up, down = layers()
    down[2].weights.values[:, ::2] *= 1e-6
    down[2].dense.copy_(ReferenceBackend(torch.bfloat16).pack(down[2].weights).packed)
    backend = CpuBackend(isa)
    packed = stacked(backend, gate_up), stacked(backend, down)
    kinds = packed[1].metadata[:, VALUE_TYPE].tolist()
    assert kinds == [kinds[0]] * 2 + [BFLOAT16] + [kinds[0]] * 2 != [BFLOAT16] * EXPERTS
    x, (weights, ids) = inputs(9).bfloat16(), routed(9)
    assert error(multiply(x, weights, ids, *packed), oracle(x, weights, ids, gate_up, down)) < 6e-3


@pytest.mark.parametrize("activation", [SILU, GELU_TANH])
@pytest.mark.parametrize("gate", [-1e2, -1e30, -1e37, -torch.inf, torch.nan, 1e30])
def test_gates_far_from_zero(isa: str, gate: float, activation: int) -> None:
    """Either is 0 below, whatever up is, and the gate above; what is no number stays none."""
    backend = CpuBackend(isa)
    gate_up, down = layers()
    for one in (*gate_up, *down):
        one.weights.values.fill_(2.0**-7)  # a row keeps 128 of them, of down 64
    for one in gate_up:
        one.weights.values[:INTERMEDIATE] = 0.0
        one.weights.values[:INTERMEDIATE, 0] = gate
    packed = stacked(backend, gate_up), stacked(backend, down)
    for tokens in (1, 40):
        x, (weights, ids) = torch.ones(tokens, HIDDEN).bfloat16(), routed(tokens)
        y = multiply(x, weights, ids, *packed, activation).double()
        if gate != gate:
            assert y.isnan().all()
            continue
        expected = max(gate, 0.0) * weights.double().sum(dim=1, keepdim=True) * 2**-1
        assert ((y - expected).abs() <= 2**-7 * expected + 1e-30).all()


@pytest.mark.parametrize("product", [-1e2, -torch.inf, torch.nan, 1e10])
def test_squares_far_from_zero(isa: str, product: float) -> None:
    """Nothing below 0; what is no number stays none."""
    backend = CpuBackend(isa)
    up, down = layers(gated=False)
    for one in up:
        one.weights.values.zero_()
        one.weights.values[:, 0] = product
    for one in down:
        one.weights.values.fill_(2.0**-6)  # a row keeps 64 of them
    packed = stacked(backend, up), stacked(backend, down)
    for tokens in (1, 40):
        x, (weights, ids) = torch.ones(tokens, HIDDEN).bfloat16(), routed(tokens)
        y = multiply(x, weights, ids, *packed, RELU2).double()
        if product != product:
            assert y.isnan().all()
            continue
        square = torch.tensor(max(product, 0.0)).bfloat16().double() ** 2
        expected = square * weights.double().sum(dim=1, keepdim=True)
        assert ((y - expected).abs() <= 2**-6 * expected).all()


def test_opcheck(isa: str) -> None:
    gate_up, down = (stacked(CpuBackend(isa), experts) for experts in layers("int8"))
    torch.library.opcheck(
        torch.ops.permllm.sparse_experts.default,
        (inputs(3).bfloat16(), *routed(3), *operands(gate_up, down)),
    )
    transposed = torch.randn(HIDDEN, 3).bfloat16().T
    torch.library.opcheck(
        torch.ops.permllm.sparse_experts.default,
        (transposed, *routed(3), *operands(gate_up, down)),
    )
