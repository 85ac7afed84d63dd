import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.packing import (
    count_violations,
    first_violation,
    pack_mask,
    pack_values,
    unpack,
    unpack_mask,
)
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.int8]


def random_mask(rows: int, channels: int, pattern: Pattern, seed: int) -> torch.Tensor:
    scores = torch.rand(
        rows,
        channels // pattern.group,
        pattern.group,
        generator=torch.Generator().manual_seed(seed),
    )
    kept = scores.topk(pattern.kept, dim=2).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(2, kept, True).flatten(1)


def random_weight(rows: int, channels: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    weight = torch.randint(-9, 10, (rows, channels), generator=torch.Generator().manual_seed(seed))
    weight = weight.to(dtype)
    if dtype.is_floating_point:
        weight[torch.rand(rows, channels) < 0.2] = -0.0
    return weight


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


shapes = st.tuples(st.integers(1, 9), st.integers(1, 9).map(lambda blocks: 64 * blocks))
patterns = st.sampled_from([Pattern.parse(text) for text in SUPPORTED])
seeds = st.integers(0, 2**31)


@given(shapes, seeds)
def test_mask_bits_match_a_plain_loop(shape: tuple[int, int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    expected = [
        [sum(1 << b for b in range(8) if mask[r, 8 * i + b]) for i in range(shape[1] // 8)]
        for r in range(shape[0])
    ]
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == expected
    assert torch.equal(unpack_mask(packed), mask)
    assert unpack_mask(packed).dtype == torch.bool


@given(shapes, patterns, st.sampled_from(DTYPES), seeds)
def test_values_match_a_plain_loop_and_come_back(
    shape: tuple[int, int], pattern: Pattern, dtype: torch.dtype, seed: int
) -> None:
    mask = random_mask(*shape, pattern, seed)
    weight = random_weight(*shape, dtype, seed)
    values = pack_values(weight, mask, pattern)
    expected = torch.stack(
        [
            torch.stack([w for w, m in zip(ws, ms, strict=True) if m])
            for ws, ms in zip(weight, mask, strict=True)
        ]
    )
    assert values.shape == (shape[0], shape[1] * pattern.kept // pattern.group)
    assert values.is_contiguous()
    assert bits(values) == bits(expected)

    dense = unpack(values, pack_mask(mask))
    assert dense.dtype == dtype
    assert bits(dense) == bits(torch.where(mask, weight, torch.zeros((), dtype=dtype)))


def test_zeros_and_their_sign_are_kept() -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, 2.0, 0.0, 0.0, -0.0, -0.0]])
    mask = torch.tensor([[True, True, False, False, False, True, True, False]])
    values = pack_values(weight, mask, Pattern(2, 4))
    assert torch.signbit(values).tolist() == [[False, True, False, True]]
    assert torch.signbit(unpack(values, pack_mask(mask)))[0, 1]


def test_packing_reads_non_contiguous_tensors() -> None:
    mask = random_mask(16, 8, Pattern(2, 4), 0)
    weight = random_weight(16, 8, torch.float32, 0)
    transposed_mask, transposed = mask.t().contiguous().t(), weight.t().contiguous().t()
    assert torch.equal(pack_mask(transposed_mask), pack_mask(mask))
    assert torch.equal(
        pack_values(transposed, transposed_mask, Pattern(2, 4)),
        pack_values(weight, mask, Pattern(2, 4)),
    )


@given(shapes, patterns, st.floats(0.2, 0.8), seeds)
def test_violations_match_a_plain_loop(
    shape: tuple[int, int], pattern: Pattern, density: float, seed: int
) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    wrong = [
        (row, group, count)
        for row in range(shape[0])
        for group in range(shape[1] // pattern.group)
        if (count := int(mask[row, group * pattern.group :][: pattern.group].sum())) != pattern.kept
    ]
    packed = pack_mask(mask)
    assert count_violations(packed, pattern) == len(wrong)
    assert first_violation(packed, pattern) == (wrong[0] if wrong else None)


def test_a_group_with_another_number_is_refused_with_its_place() -> None:
    mask = random_mask(4, 16, Pattern(2, 4), 1)
    mask[2, 8:12] = torch.tensor([True, True, True, False])
    with pytest.raises(CheckpointError, match=r"keeps 3 weights in row 2, group 2.*exactly 2 of 4"):
        pack_values(torch.ones(4, 16), mask, Pattern(2, 4))


def test_odd_sizes_and_dtypes_are_refused() -> None:
    with pytest.raises(CheckpointError, match="multiple of 8"):
        pack_mask(torch.ones(2, 12, dtype=torch.bool))
    with pytest.raises(CheckpointError, match="rule: bool"):
        pack_mask(torch.ones(2, 8))
    with pytest.raises(CheckpointError, match="rule: uint8"):
        unpack_mask(torch.ones(2, 8, dtype=torch.int64))
    with pytest.raises(CheckpointError, match="equal shapes"):
        pack_values(torch.ones(2, 8), torch.ones(2, 16, dtype=torch.bool), Pattern(2, 4))


def test_unpack_refuses_a_mask_that_disagrees_with_the_values() -> None:
    packed = torch.full((3, 1), 0b00110011, dtype=torch.uint8)
    values = torch.ones(3, 4)
    packed[1] = 0b01110011
    packed[2] = 0b00010011  # the total agrees, the rows do not
    with pytest.raises(CheckpointError, match="row 1 keeps 5 weights and 4 values"):
        unpack(values, packed)
    with pytest.raises(CheckpointError, match="one row of values"):
        unpack(torch.ones(2, 4), packed)
