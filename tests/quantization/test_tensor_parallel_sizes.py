"""Which inputs can be cut: whole blocks where permuted at run time, whole mask bytes elsewhere."""

from collections.abc import Callable

import pytest
from vllm.model_executor.layers.linear import (
    RowParallelLinear,
)

from tests.quantization.sparse_modules import config

DOWN = "model.layers.0.mlp.down_proj"
OnRank = Callable[[int, int], None]


def build(
    channels: int, *, permuted: bool, values: str = "bfloat16", pattern: str = "2:4"
) -> RowParallelLinear:
    listed = {"runtime_permuted": [DOWN]} if permuted else {"folded": [DOWN]}
    given = config(**listed, value_dtype=values, pattern=pattern)
    return RowParallelLinear(channels, 8, bias=False, quant_config=given, prefix=DOWN)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_llama_down_permuted_at_run_time(on_rank: OnRank, size: int) -> None:
    on_rank(0, size)
    assert build(11008, permuted=True).weight_packed.shape == (8, 11008 // size // 2)


def test_llama_down_permuted_at_run_time_on_eight_ranks(on_rank: OnRank) -> None:
    on_rank(0, 8)
    with pytest.raises(ValueError, match="1376 of its 11008 input channels") as error:
        build(11008, permuted=True)
    for part in (DOWN, "over 8", "no multiple of 64", "--tensor-parallel-size 4"):
        assert part in str(error.value)
    build(11008, permuted=False)


@pytest.mark.parametrize(
    ("channels", "size", "multipliers"), [(11008, 4, 43), (11008, 8, 43), (96, 1, 2), (96, 2, 3)]
)
def test_groups_of_int4_values_may_be_cut(
    on_rank: OnRank, channels: int, size: int, multipliers: int
) -> None:
    on_rank(0, size)
    layer = build(channels, permuted=False, values="int4")
    assert layer.weight_packed.shape == (8, channels // size // 4)
    assert layer.weight_multiplier.shape == (8, multipliers)


def test_mask_bytes_stay_whole(on_rank: OnRank) -> None:
    on_rank(0, 4)
    with pytest.raises(ValueError, match="leaves 12 of its 48") as error:
        build(48, permuted=False)
    assert "--tensor-parallel-size 3" in str(error.value)


@pytest.mark.parametrize(
    ("pattern", "channels", "size", "left", "fitting"),
    [("8:16", 96, 4, 24, 3), ("32:64", 11008, 8, 1376, 4)],
)
def test_groups_stay_whole(
    on_rank: OnRank, pattern: str, channels: int, size: int, left: int, fitting: int
) -> None:
    on_rank(0, fitting)
    build(channels, permuted=False, pattern=pattern)
    on_rank(0, size)
    with pytest.raises(ValueError, match=f"leaves {left} of its {channels}") as error:
        build(channels, permuted=False, pattern=pattern)
    for part in (f"its pattern {pattern}", f"--tensor-parallel-size {fitting}"):
        assert part in str(error.value)


def test_no_number_of_ranks_helps(on_rank: OnRank) -> None:
    with pytest.raises(ValueError, match="no multiple of 64") as error:
        build(96, permuted=True)
    assert "an `ignore` entry" in str(error.value)
