"""The CUDA sources compile for one architecture and keep their sums in registers.

CUTLASS' GEMM is left out: it takes minutes.
"""

import re
import subprocess

import pytest

from csrc.cuda import build, toolkit
from tests.cuda.conftest import SOURCES

LARGEST_SPILL = 16  # bytes of a thread


@pytest.mark.skipif(toolkit.nvcc() is None, reason="needs nvcc: install the CUDA toolkit")
@pytest.mark.parametrize("name", ["device", "permute", "few_tokens", "many_tokens_mma"])
def test_compiles(name, tmp_path):
    command = [
        toolkit.nvcc(), *build.NVCC_FLAGS, "-gencode", "arch=compute_80,code=sm_80",
        "-Xptxas", "-v", "-c", str(SOURCES / f"{name}.cu"), "-o", str(tmp_path / "object.o"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "warning" not in result.stderr, result.stderr[-4000:]
    spills = [int(bytes_) for bytes_ in re.findall(r"(\d+) bytes spill stores", result.stderr)]
    assert len(spills) >= (0 if name == "device" else 3)
    assert all(spill <= LARGEST_SPILL for spill in spills)
