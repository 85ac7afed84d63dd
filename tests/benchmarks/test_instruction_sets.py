"""What lesser instruction sets are held against."""

import pytest
import torch

from benchmarks import instruction_sets
from benchmarks.cpu import contestants
from benchmarks.instruction_sets import FLOAT32, TORCH, VLLM, measure, table


@pytest.mark.parametrize("has_vllm", [False, True])
@pytest.mark.parametrize("fastest", [TORCH, FLOAT32, VLLM])
def test_the_ratio_that_counts_is_to_the_fastest_dense_contestant(
    has_vllm: bool, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def median_times(found: dict[str, object], *_: object) -> dict[str, float]:
        dense = {name: 8.0 if name == fastest else 12.0 for name in (TORCH, FLOAT32, VLLM)}
        return {name: dense.get(name, 4.0 if name == "bfloat16" else 2.0) for name in found}

    make = instruction_sets._bfloat16_linear
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)
    monkeypatch.setattr(instruction_sets, "vllm_primitive", lambda _: make if has_vllm else None)
    monkeypatch.setattr(instruction_sets, "median_times", median_times)
    with torch.inference_mode():
        rows = measure((64, 64), [4], "2:4")
    best = 8.0 if has_vllm or fastest != VLLM else 12.0
    assert [(row.value_dtype, row.fastest_ratio) for row in rows] == [
        ("bfloat16", best / 4), ("int8", best / 2)
    ]  # fmt: skip
    for row in rows:
        assert row.fastest == (fastest if best == 8.0 else TORCH)
        assert row.ratio == row.peer_us / row.ours_us
        assert (row.vllm_us is not None) is has_vllm
    last = list(table(rows).columns[-1].cells)
    assert last == [f"{best / 4:.2f}x", f"{best / 2:.2f}x"]
