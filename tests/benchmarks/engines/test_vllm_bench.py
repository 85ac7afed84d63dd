"""What vLLM's own benchmarks are asked, and what is read of what they write."""

import sys
from pathlib import Path

import pytest

from benchmarks.engines import vllm_bench


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
