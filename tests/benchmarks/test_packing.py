"""What the benchmark of packing measures and shows."""

from dataclasses import asdict

import pytest
import torch

from benchmarks.cpu.kernel_tables import packing as shown
from benchmarks.packing import Row, measure, random_weights
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.reference import ReferenceBackend

SLACK = (512 << 10) + 2 * (2 << 20)
"""Bytes that packing may need beside a layer's tensors and packed blocks, each of which is more.

Packed blocks begin and end inside huge pages.
"""
built = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_random_weights_are_those_of_a_checkpoint(values: str) -> None:
    weights = random_weights(24, 128, values)
    bits = (weights.mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    assert (bits.view(24, 32, 4).sum(dim=-1) == 2).all()
    assert ReferenceBackend(torch.float32).pack(weights).packed.shape == (24, 128)


@built
@pytest.mark.parametrize(("values", "share"), [("bfloat16", 9 / 16), ("int8", 5 / 16)])
def test_a_layer_is_packed_once_a_decoder_layer(values: str, share: float) -> None:
    twelve_bits = values == "bfloat16" and CpuBackend().instruction_set == "zen5"
    n, k = 2048, 4096
    measure(n, k, values, layers=1)  # starts the threads and loads code, which stays
    row = measure(n, k, values, layers=2)
    assert (row.n, row.k, row.value_dtype, row.layers) == (n, k, values, 2)
    dense = n * k * 2
    assert row.packed_bytes == pytest.approx((7 / 16 if twelve_bits else share) * dense, rel=0.01)
    assert row.tensor_bytes == pytest.approx(share * dense, rel=0.01)
    if row.peak_bytes is not None:
        assert row.peak_bytes == pytest.approx(row.tensor_bytes + row.packed_bytes, abs=SLACK)


def test_the_table_shows_sums_and_the_largest_layer() -> None:
    small = Row(8, 64, "int8", 32, 0.5, 0.75, 2 << 20, 1 << 20, None)
    large = Row(16, 64, "int8", 32, 1.0, 1.5, 5 << 20, 4 << 20, 9 << 20)
    cells = shown({"rows": [asdict(small), asdict(large)]}).splitlines()[-1]
    assert cells == "| int8 | 1.5 | 2.2 | 0.16 | 4.0 | 5.0 | 9.0 |"
