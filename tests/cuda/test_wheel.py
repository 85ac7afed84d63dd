"""A wheel that holds the CUDA library, installed where there may be no driver."""

import shutil
import subprocess
import sys
from zipfile import ZipFile

import pytest

from tests.cuda.library_build import ARCHITECTURES, ROOT
from tests.packaging.conftest import BUILD, SKIPPED, install, run_installed

pytestmark = pytest.mark.timeout(1800)

MULTIPLY = """
import torch
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, select_backend
from permllm_vllm.checkpoint import packing
from permllm_vllm.checkpoint.pattern import Pattern
pattern = Pattern(2, 4)
weight = torch.randn(48, 128).bfloat16()
mask = torch.tensor([True, False, False, True]).repeat(48, 32)
weights = CheckpointWeights(packing.pack_values(weight, mask, pattern), packing.pack_mask(mask),
                            None, None, pattern, 64)
backend = select_backend(torch.device("cpu"), torch.bfloat16)
packed = backend.pack(weights)
x = torch.randn(5, 128).bfloat16()
y = ops.sparse_linear(x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, 48,
                      "2:4")
exact = x.double() @ (weight * mask).double().T
print(ops.__file__)
print(ops.cuda_missing_reason)
print(torch.ops.permllm.cuda_architectures())
print(float((y.double() - exact).norm() / exact.norm()))
"""


def test_a_wheel_with_the_library_serves_on_the_cpu(library, tmp_path, monkeypatch):
    """It is linked from the objects of that library: nothing is compiled again."""
    sources, output, environment = (tmp_path / name for name in ("sources", "wheel", "installed"))
    shutil.copytree(ROOT, sources, ignore=SKIPPED)
    kept, copied = (root / "build" / "objects" / "cuda" for root in (ROOT, sources))
    shutil.copytree(kept, copied)
    output.mkdir()
    monkeypatch.setenv("PERMLLM_BUILD_CUDA", "1")
    monkeypatch.setenv("PERMLLM_BUILD_CPU", "0")
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", ARCHITECTURES)
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind="wheel", output=str(output))],
        cwd=sources, capture_output=True, check=True,
    )  # fmt: skip
    for file in copied.iterdir():
        assert file.stat().st_mtime_ns == (kept / file.name).stat().st_mtime_ns, file.name
    (wheel,) = output.iterdir()
    with ZipFile(wheel) as archive:
        assert archive.getinfo("permllm_vllm/_C_cuda.so").file_size == library.path.stat().st_size
    install(wheel, environment)
    printed = run_installed(environment, "-c", MULTIPLY, cwd=tmp_path).stdout.splitlines()
    file, reason, architectures, error = printed
    assert file.startswith(str(environment))
    assert reason == ""
    assert architectures == ARCHITECTURES
    assert float(error) < 5e-3
