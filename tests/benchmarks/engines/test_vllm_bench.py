"""What vLLM's own benchmarks are asked, and what is read of what they write."""

import json
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import vllm_bench

LATENCY = {
    "model_id": "tiny",
    "avg_latency": 0.30,
    "latencies": [0.21, 0.25, 0.44],
    "percentiles": {"10": 0.218, "25": 0.23, "50": 0.25, "75": 0.345, "90": 0.402, "99": 0.4362},
}
THROUGHPUT = {
    "model_id": "tiny",
    "elapsed_time": 2.0,
    "num_requests": 6,
    "total_num_tokens": 480,
    "requests_per_second": 3.0,
    "tokens_per_second": 240.0,
}
"""What vLLM 0.32 writes."""


def test_a_benchmark_beyond_the_memory_limit_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = tmp_path / "vllm"
    vllm.write_text(
        f"#!{sys.executable}\nimport sys\nheld = bytearray(96 << 20)\n"
        'held[::4096] = b"x" * len(held[::4096])\nimport time; time.sleep(60)\n'
    )
    vllm.chmod(0o755)
    monkeypatch.setattr(vllm_bench, "VLLM", str(vllm))
    with pytest.raises(RuntimeError, match=r"MiB, more than 0.0625 GiB"):
        vllm_bench.measured("latency", tmp_path, tmp_path, (1, 32), eager=True, memory_limit=1 / 16)


def as_vllm_reads(benchmark: str, arguments: list[str]) -> Namespace:
    """Options of `vllm bench`, by its own parser."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    import_module(f"vllm.benchmarks.{benchmark}").add_cli_args(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("benchmark", "written", "expected", "asked"),
    [
        (
            "latency",
            LATENCY,
            {"seconds": 0.25},
            {"batch_size": 2, "input_len": 48, "output_len": 32, "num_iters": 5},
        ),
        (
            "throughput",
            THROUGHPUT,
            {"tokens_per_second": 240.0},
            {"max_num_seqs": 2, "random_input_len": 48, "random_output_len": 32, "num_prompts": 10},
        ),
    ],
)
def test_a_benchmark_is_asked_for_a_cell_and_read(
    benchmark: str,
    written: dict[str, Any],
    expected: dict[str, float],
    asked: dict[str, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    vllm, arguments, result = (tmp_path / name for name in ("vllm", "arguments", "result"))
    result.write_text(json.dumps(written))
    vllm.write_text(
        f"#!{sys.executable}\nimport json, shutil, sys\nfrom pathlib import Path\n"
        f"Path({str(arguments)!r}).write_text(json.dumps(sys.argv[1:]))\n"
        f"shutil.copy({str(result)!r}, sys.argv[sys.argv.index('--output-json') + 1])\n"
    )
    vllm.chmod(0o755)
    monkeypatch.setattr(vllm_bench, "VLLM", str(vllm))
    cell = 2, 48
    found = vllm_bench.measured(benchmark, tmp_path / "tiny", tmp_path / "words", cell, eager=True)
    assert found == expected
    command, name, *options = json.loads(arguments.read_text())
    assert (command, name) == ("bench", benchmark)
    parsed = vars(as_vllm_reads(benchmark, options))
    assert parsed["model"] == str(tmp_path / "tiny")
    assert parsed["enforce_eager"] is True
    assert asked.items() <= parsed.items()
