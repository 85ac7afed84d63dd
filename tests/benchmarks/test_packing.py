"""What the benchmark of packing measures and shows."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from benchmarks import packing
from benchmarks.cpu.kernel_tables import packing as shown
from benchmarks.packing import Row, measure, random_weights
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.reference import ReferenceBackend
from tests.kernels.cases import TWELVE_BITS

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
    twelve_bits = values == "bfloat16" and CpuBackend().instruction_set in TWELVE_BITS
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


@built
def test_a_shape_that_the_result_holds_is_not_packed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(n: int, k: int, values: str, layers: int) -> Row:
        asked.append((n, values))
        if n == stopped:
            raise KeyboardInterrupt
        return Row(n, k, values, layers, 0.5, 0.75, 2 << 20, 1 << 20, None)

    asked: list[tuple[int, str]] = []
    stopped, file = 16, tmp_path / "result.json"
    monkeypatch.setattr(packing, "measure", measured)
    command = ["packing", "--threads", str(torch.get_num_threads()), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*command, "--shapes", "8x64", "16x64"])
    with pytest.raises(KeyboardInterrupt):
        packing.main()
    stopped = 0
    packing.main()
    first = [(8, "bfloat16"), (16, "bfloat16")]
    assert asked == [*first, (16, "bfloat16"), (8, "int8"), (16, "int8")]
    assert len(json.loads(file.read_text())["rows"]) == 4
    monkeypatch.setattr(sys, "argv", [*command, "--decoder-layers", "2"])
    with pytest.raises(SystemExit):
        packing.main()
    assert "decoder_layers 32, this run has 2" in capsys.readouterr().err
