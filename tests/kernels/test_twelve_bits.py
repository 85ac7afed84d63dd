"""bfloat16 values in 12 bits: which layers are stored so, and that none of their values changes."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.shapes import Layer, random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint import packing, permutation
from tests.kernels.cases import GROUPS, on_each_with_twelve_bits
from tests.kernels.test_cpu import run

VALUE_TYPE, STRAYS = 5, 6
"""Places in the metadata, as csrc/cpu/packing/layout.h numbers them."""
BFLOAT16, BFLOAT12, GROUPED_BFLOAT12 = 0, 2, 12
POWERS = 13
"""Powers of two that a row has at least, its largest included."""
VALUES_OF_STRAY = 512
TOKENS = (1, 2, 3, 6, 7, 12, 16, 17, 32, 33, 48, 100, 300)  # every kernel

pytestmark = on_each_with_twelve_bits


def layer_of(values: Tensor, *, permuted: bool = True) -> Layer:
    """A 2:4 layer with these kept values, `[out, in / 2]`."""
    n, k = values.shape[0], values.shape[1] * 2
    drawn = random_layer(n, k, permuted=permuted)
    weights = replace(drawn.weights, values=values)
    dense = packing.unpack(values, weights.mask)
    if weights.permutation is not None:
        dense = permutation.unpermute_columns(dense, weights.permutation, weights.block_size)
    return replace(drawn, weights=weights, dense=dense)


def twelve_bits(isa: str) -> int:
    """The type of values in 12 bits."""
    return GROUPED_BFLOAT12 if isa in GROUPS else BFLOAT12


def packed_as(isa: str, layer: Layer) -> tuple[int, int]:
    """The type of the packed values, and how many of them are strays."""
    metadata = CpuBackend(isa).pack(layer.weights).metadata
    assert metadata is not None
    return int(metadata[VALUE_TYPE]), int(metadata[STRAYS])


def weights_read(isa: str, layer: Layer, tokens: int) -> Tensor:
    """`[in, out]`, by unit inputs, so many at a time."""
    inputs = torch.eye(layer.dense.shape[1]).bfloat16()
    return torch.cat([run(layer, isa, part) for part in inputs.split(tokens)])


def row_of(*powers: int) -> Tensor:
    """Values 1.5 * 2**power, of alternating sign, repeated to 64."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)
    magnitudes = 1.5 * torch.tensor(powers, dtype=torch.float32).exp2()
    return (signs * magnitudes.repeat(64)[:64]).bfloat16()


@pytest.mark.parametrize("tokens", TOKENS)
def test_strays_are_multiplied_by_every_kernel(isa: str, tokens: int) -> None:
    """A value of every other row is far below the others."""
    values = torch.ones(21, 1024, dtype=torch.bfloat16)
    for row in range(0, 21, 2):
        values[row, (137 * row + 5) % 1024] = -(2.0 ** (-20 - row))
    layer = layer_of(values)
    assert packed_as(isa, layer) == (twelve_bits(isa), 11)
    assert torch.equal(weights_read(isa, layer, tokens), layer.dense.t())


@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_an_infinity_meets_a_stray_alone(isa: str, tokens: int) -> None:
    """And no other row of its row group, where inputs are brought to kept values."""
    if isa not in GROUPS:
        pytest.skip(f"{isa} expands rows: pruned zeros meet the infinity")
    values = torch.ones(16, 128, dtype=torch.bfloat16)
    values[5, 77] = 2.0**-30
    layer = layer_of(values)
    assert packed_as(isa, layer) == (twelve_bits(isa), 1)
    x = torch.ones(tokens, 256).bfloat16()
    column = layer.dense[5].abs().where(layer.dense[5] != 0, torch.inf).argmin()
    x[:, column] = float("inf")
    kept = layer.dense[:, column] != 0
    assert 1 < int(kept.sum()) < 16
    assert torch.equal(run(layer, isa, x).isfinite(), (~kept).expand(tokens, 16))


def test_a_row_has_its_own_powers(isa: str) -> None:
    """Rows of one group whose values are 2**56 apart have no strays."""
    values = torch.stack([row_of(*range(-7 * row, POWERS - 7 * row)) for row in range(9)])
    layer = layer_of(values)
    assert packed_as(isa, layer) == (twelve_bits(isa), 0)
    assert torch.equal(weights_read(isa, layer, 1), layer.dense.t())


@pytest.mark.parametrize("largest", [0, 1])
def test_powers_of_a_row(isa: str, largest: int) -> None:
    """One more where the largest value has the upper power of its pair: the bias is odd."""
    fits = POWERS + (largest + 1) % 2
    lowest = largest - fits + 1
    values = torch.full((16, 512), 2.0**largest, dtype=torch.bfloat16)
    values[3, 7] = 2.0**lowest
    assert packed_as(isa, layer_of(values)) == (twelve_bits(isa), 0)
    values[3, 7] = 2.0**lowest * (1 - 2**-8)
    assert packed_as(isa, layer_of(values)) == (twelve_bits(isa), 1)


def test_too_many_strays_are_stored_in_sixteen_bits(isa: str) -> None:
    values = torch.ones(32, 512, dtype=torch.bfloat16)
    most = values.numel() // VALUES_OF_STRAY
    values[:most, 3] = 2.0**-30
    assert packed_as(isa, layer_of(values)) == (twelve_bits(isa), most)
    values[most - 1, 4] = 2.0**-30
    layer = layer_of(values)
    assert packed_as(isa, layer) == (BFLOAT16, 0)
    for tokens in TOKENS:
        assert torch.equal(weights_read(isa, layer, tokens), layer.dense.t())


def test_other_values_take_as_many_bytes(isa: str) -> None:
    """vLLM loads new weights of a running model into the memory of the old ones."""
    values = torch.ones(48, 512, dtype=torch.bfloat16)
    few = CpuBackend(isa).pack(layer_of(values).weights)
    values[:, 7] = 2.0**-30
    many = CpuBackend(isa).pack(layer_of(values).weights)
    assert few.metadata is not None
    assert many.metadata is not None
    assert many.metadata[STRAYS] - few.metadata[STRAYS] == 48
    assert many.packed.nbytes == few.packed.nbytes


def test_zeros_of_either_sign_and_rows_of_zeros(isa: str) -> None:
    values = row_of(0, -3).repeat(17, 1)
    values[:, ::5] = 0.0
    values[:, 1::5] = -0.0
    values[4] = -0.0
    layer = layer_of(values)
    assert packed_as(isa, layer) == (twelve_bits(isa), 0)
    for tokens in (1, 7, 48, 64):
        assert torch.equal(weights_read(isa, layer, tokens), layer.dense.t())


@pytest.mark.parametrize("odd", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite(isa: str, odd: float) -> None:
    """All others of the row are strays beside them: the layer has 16 bits, and the same result."""
    layer = random_layer(24, 512, permuted=False)  # 12 bits may keep the permuted order, 16 do not
    values = layer.weights.values.clone()
    values[5, 9] = odd
    changed = replace(layer, weights=replace(layer.weights, values=values))
    assert packed_as(isa, changed) == (BFLOAT16, 0)
    x = torch.ones(3, 512).bfloat16()
    y, expected = run(changed, isa, x), run(layer, isa, x)
    assert torch.equal(y[:, 5], torch.full((3,), odd).bfloat16()) or y[:, 5].isnan().all()
    assert torch.equal(
        torch.cat([y[:, :5], y[:, 6:]], 1), torch.cat([expected[:, :5], expected[:, 6:]], 1)
    )


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("k", [8, 72, 136, 1088])
def test_inputs_that_fill_no_block(isa: str, k: int, pattern: str) -> None:
    layer = random_layer(13, k, pattern, permuted=False)
    for tokens in (1, 6, 7, 48, 64):
        assert torch.equal(weights_read(isa, layer, tokens), layer.dense.t())


@given(
    spread=st.integers(0, 40),
    rows=st.integers(1, 20),
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from(TOKENS),
)
def test_no_value_changes(isa: str, spread: int, rows: int, seed: int, tokens: int) -> None:
    """Whatever powers the values have, stored in 12 bits or in 16."""
    generator = torch.Generator().manual_seed(seed)
    powers = torch.rand(rows, 96, generator=generator) * spread - 20
    values = (powers.exp2() * torch.randn(rows, 96, generator=generator)).bfloat16()
    layer = layer_of(values)
    assert torch.equal(weights_read(isa, layer, tokens), layer.dense.t())


def test_metadata_that_claim_other_strays_are_refused(isa: str) -> None:
    layer = random_layer(512, 512)
    packed = CpuBackend(isa).pack(layer.weights)
    assert packed.metadata is not None
    x = torch.ones(1, 512).bfloat16()
    for strays in (-1, 512 * 256 // VALUES_OF_STRAY + 1):
        metadata = packed.metadata.clone()
        metadata[STRAYS] = strays
        with pytest.raises(RuntimeError, match="corrupted"):
            ops.sparse_linear(x, packed.packed, metadata, None, None, None, 512, "2:4")
