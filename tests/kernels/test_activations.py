"""Activations of float16 and float32: summed in float32, rounded once.

Products are exact, but where many float16 meet bfloat16 values: those are rounded to bfloat16.
"""

from collections.abc import Callable

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, select_backend
from permllm_vllm.backends.cpu import SIXTEEN_BITS_ONLY, CpuBackend, instruction_sets
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import Case, cases
from tests.kernels.test_int8 import INTEGERS

CPU = torch.device("cpu")
TOKENS = (1, 2, 5, 7, 13, 33, 300)
# Tokens of float16 whose products with bfloat16 values are exact, where not all are.
EXACT_TOKENS = {"amx": 16, "zen5": 2, "avx512_bf16": 2}
ROUNDING = {torch.float16: 2**-11, torch.float32: 1e-6}
REAL = tuple(ROUNDING)


def serves(isa: str, dtype: torch.dtype) -> bool:
    """Whether the kernels of an instruction set take such activations."""
    return dtype != torch.float32 or isa not in SIXTEEN_BITS_ONLY


@pytest.fixture(params=REAL, ids=str)
def path(isa: str, request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    """Every instruction set and dtype of activations that it multiplies."""
    if not serves(isa, request.param):
        pytest.skip(f"{isa} multiplies activations of 16 bits alone")
    return isa, request.param


def run(layer, packed, x):
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return ops.sparse_linear(
        x, packed.packed, packed.metadata, packed.permutation, packed.scale, bias,
        layer.dense.shape[0], str(layer.weights.pattern),
    )  # fmt: skip


@pytest.mark.parametrize("case", [c for c in cases() if c.n * c.k < 60_000], ids=str)
def test_matches_float64(case: Case, path: tuple[str, torch.dtype]) -> None:
    isa, dtype = path
    layer = case.layer()
    packed = CpuBackend(isa, dtype).pack(layer.weights)
    for m in TOKENS:
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(dtype)
        y = run(layer, packed, x)
        exact = x.double() @ layer.dense.double().t()
        size = x.double().abs() @ layer.dense.double().abs().t()
        if layer.bias is not None:
            exact += layer.bias.double()
            size += layer.bias.double().abs()
        assert y.dtype == dtype
        # float32 sums are off by their size, the rounding of y by that of y.
        limit = ROUNDING[dtype] * exact.abs() + 1e-6 * size + 2**-24
        if m > EXACT_TOKENS.get(isa, m):
            limit += 2**-9 * size
        assert ((y.double() - exact).abs() <= limit).all()


def test_int8_values_meet_them_as_they_are(path: tuple[str, torch.dtype]) -> None:
    isa, dtype = path
    if isa in INTEGERS and dtype != torch.float32:
        pytest.skip(f"{isa} rounds them to integers: test_int8.py")
    layer = random_layer(40, 256)
    values = (layer.weights.values.float() * 500).round().clamp(-127, 127).to(torch.int8)
    scale = torch.rand(40) + 0.5
    weights = type(layer.weights)(**{**vars(layer.weights), "values": values, "scale": scale})
    dense = select_backend(CPU, torch.float32, torch.float32).pack(weights).packed
    packed = CpuBackend(isa, dtype).pack(weights)
    for m in (1, 3, 20):
        x = torch.randn(m, 256).to(dtype)
        exact = x.double() @ dense.double().t()
        size = x.double().abs() @ dense.double().abs().t()
        limit = ROUNDING[dtype] * exact.abs() + 1e-6 * size
        assert ((run(layer, packed, x).double() - exact).abs() <= limit).all()


def only_first_input(x: torch.Tensor) -> torch.Tensor:
    """64 inputs of which all but the first are zeros."""
    return torch.nn.functional.pad(x.unsqueeze(1), (0, 63))


def first_input_alone(isa: str) -> Callable[[torch.Tensor, float], torch.Tensor]:
    """A layer that adds a bias to the first of its 64 inputs, called with one token at a time."""
    values = torch.tensor([[1.0, *[0.0] * 31]], dtype=torch.bfloat16)
    mask = torch.full((1, 8), 0x0F, dtype=torch.uint8)
    weights = CheckpointWeights(values, mask, None, None, Pattern(4, 8), 64)
    packed = CpuBackend(isa, torch.float16).pack(weights)

    def call(x: torch.Tensor, bias: float) -> torch.Tensor:
        return ops.sparse_linear(
            x, packed.packed, packed.metadata, packed.permutation, None,
            torch.tensor([bias], dtype=torch.float16), 1, "4:8",
        )[:, 0]  # fmt: skip

    return call


def test_every_float16_passes_unchanged(isa: str) -> None:
    """Zeros of both signs, subnormals, infinities; what is no number stays none."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    call, few = first_input_alone(isa), EXACT_TOKENS.get(isa, 2**16)
    y = torch.cat([call(part, 0.0) for part in only_first_input(every).split(few)])
    numbers = ~every.isnan()
    assert torch.equal(y.isnan(), every.isnan())
    assert torch.equal(y[numbers], every[numbers])
    if few < len(every):
        rounded = call(only_first_input(every), 0.0)
        assert torch.equal(rounded.isnan(), every.isnan())
        assert torch.equal(rounded[numbers], every[numbers].bfloat16().half())


def test_float16_is_rounded_to_nearest_even(isa: str) -> None:
    """Sums that lie between two float16: in the middle, beside it, below and beyond their range."""
    call = first_input_alone(isa)
    x = torch.tensor([1, 65504, 2**-24, -(2**-14)], dtype=torch.float16)
    for extra in (0.0, 2**-11, 3 * 2**-11, 2**-11 + 2**-20, -(2**-12), 15.0, 16.0, 2**-25, 2**-24):
        y = torch.cat([call(one, extra) for one in only_first_input(x).split(1)])
        assert torch.equal(y, (x.float() + torch.tensor(extra).half().float()).half())


@pytest.mark.skipif(
    not set(SIXTEEN_BITS_ONLY) & set(instruction_sets()), reason="no such kernel here"
)
def test_another_instruction_set_serves_float32() -> None:
    assert CpuBackend(dtype=torch.float32).instruction_set not in SIXTEEN_BITS_ONLY
    assert CpuBackend(dtype=torch.float16).instruction_set == instruction_sets()[0]
    isa = next(isa for isa in instruction_sets() if isa in SIXTEEN_BITS_ONLY)
    assert CpuBackend(isa, torch.float32).instruction_set not in SIXTEEN_BITS_ONLY
    packed = CpuBackend(isa).pack(to_int8(random_layer(24, 128)).weights)
    with pytest.raises(RuntimeError, match=r"x is float32, .* float16: pack for avx512"):
        ops.sparse_linear(
            torch.randn(3, 128), packed.packed, packed.metadata, packed.permutation, packed.scale,
            None, 24, "2:4",
        )  # fmt: skip


def test_other_types_are_refused(isa: str) -> None:
    layer = random_layer(24, 128, bias=True)
    packed = CpuBackend(isa).pack(layer.weights)
    with pytest.raises(RuntimeError, match="bfloat16, float16 or float32"):
        run(layer, packed, torch.randn(3, 128).double())
    with pytest.raises(RuntimeError, match=r"bias.*in the dtype of x"):
        ops.sparse_linear(
            torch.randn(3, 128).half(), packed.packed, packed.metadata, packed.permutation, None,
            layer.bias, 24, "2:4",
        )  # fmt: skip
