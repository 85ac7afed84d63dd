"""Two int4 values in a byte, held against plain loops."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.checkpoint.int4 import (
    KEPT,
    LARGEST,
    MOST,
    SMALLEST,
    channels_of_multiplier,
    multiplier_count,
    multiplier_problems,
    pack_int4,
    repeat_multipliers,
    stored_values,
    unpack_int4,
)


@st.composite
def layers(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Quotients [rows, n] and multipliers [rows, groups] of a layer."""
    rows, columns = draw(st.integers(1, 4)), 4 * draw(st.integers(1, 25))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    quotients = torch.randint(SMALLEST, LARGEST + 1, (rows, columns), generator=generator)
    shape = (rows, -(-columns // KEPT))
    return quotients, torch.randint(1, MOST + 1, shape, generator=generator).to(torch.uint8)


@given(layers())
def test_every_value_comes_back(layer: tuple[torch.Tensor, torch.Tensor]) -> None:
    quotients, multipliers = layer
    rows, columns = quotients.shape
    values = torch.zeros(rows, columns, dtype=torch.int8)
    expected = bytearray()
    for row in range(rows):
        for column in range(columns):
            quotient = int(quotients[row, column])
            values[row, column] = quotient * int(multipliers[row, column // 32])
            if column % 2 == 0:
                expected.append(quotient + 8)
            else:
                expected[-1] += 16 * (quotient + 8)
    packed = pack_int4(values, multipliers)
    assert packed.shape == (rows, columns // 2)
    assert bytes(packed.flatten().tolist()) == bytes(expected)
    assert torch.equal(unpack_int4(packed, multipliers), values)
    stacked = unpack_int4(torch.stack([packed, packed]), torch.stack([multipliers, multipliers]))
    assert torch.equal(stacked, torch.stack([values, values]))


@pytest.mark.parametrize(("inputs", "shares"), [(96, 2), (192, 8), (704, 8), (256, 2), (72, 1)])
def test_shares_have_the_values_of_the_whole(inputs: int, shares: int) -> None:
    """Of whole mask bytes: 21.5 groups of 64 are what Llama-2-7B's `down` gives 8 ranks."""
    share, generator = inputs // shares, torch.Generator().manual_seed(inputs)
    multipliers = torch.randint(1, MOST + 1, (3, -(-inputs // 64)), generator=generator)
    packed = torch.randint(256, (3, inputs // 4), generator=generator).to(torch.uint8)
    multipliers = multipliers.to(torch.uint8)
    whole = unpack_int4(packed, multipliers)
    channels = channels_of_multiplier(share, inputs)
    repeated = repeat_multipliers(multipliers, channels, inputs)
    count = multiplier_count(share, inputs)
    for rank in range(shares):
        own = repeated[:, rank * count : (rank + 1) * count]
        found = unpack_int4(packed[:, rank * share // 4 : (rank + 1) * share // 4], own)
        assert torch.equal(found, whole[:, rank * share // 2 : (rank + 1) * share // 2])


def test_the_smallest_and_the_largest_product_are_int8() -> None:
    values = torch.tensor([[-128, 112] * 16], dtype=torch.int8)
    multipliers = torch.tensor([[16]], dtype=torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(values, multipliers), multipliers), values)


def test_values_without_multipliers_are_as_they_are_stored() -> None:
    values = torch.randn(3, 8)
    assert stored_values(values, None) is values


@pytest.mark.parametrize("wrong", [0, 17, 255])
def test_other_multipliers_are_found(wrong: int) -> None:
    multipliers = torch.tensor([[1, 16], [7, wrong]], dtype=torch.uint8)
    (problem,) = multiplier_problems("q.weight_multiplier", multipliers)
    assert str(wrong) in str(problem.as_error())
    assert not multiplier_problems("q.weight_multiplier", multipliers.clamp(1, 16))
