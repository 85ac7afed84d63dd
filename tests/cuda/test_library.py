"""The library, made from its sources without a GPU or a driver."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from csrc.cuda import toolkit
from tests.cuda.library_build import ARCHITECTURES, OUTPUT, ROOT

#: What every architecture has: tiles of tokens for both types and both widths of values.
OUR_KERNELS = (("mma_kernel", 16), ("reduce_kernel", 2), ("permute_kernel", 1))
#: What the name of CUTLASS' kernel for Hopper says of it, of two types.
GEMM = ("MainloopSm90TmaGmmaWarpSpecializedSparse", 2)
LARGEST_SPILL = 16  # bytes of a thread
#: What ptxas says of wgmma that waits for each other is no warning to it.
REMARK = re.compile(r"\bwarning\b|Potential Performance Loss")
SHIMS = ("stable/c/shim.h", "inductor/aoti_torch/c/shim.h")  # what is stable in libtorch
LIBRARIES = {"libtorch_cpu.so", "libc10.so", "libstdc++.so", "libgcc_s.so", "libm.so", "libc.so",
             "ld-linux-x86-64.so"}  # fmt: skip

pytestmark = pytest.mark.timeout(1800)

SERVE = """
import torch
from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends import fallback_reason, select_backend
assert not ops.cuda_missing_reason, ops.cuda_missing_reason
layer = random_layer(48, 128)
backend = select_backend(torch.device("cpu"), torch.bfloat16)
packed = backend.pack(layer.weights)
x = torch.randn(5, 128).bfloat16()
y = ops.sparse_linear(
    x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, 48, "2:4"
)
exact = x.double() @ layer.dense.double().T
print(ops.__file__)
print(backend.name, float((y.double() - exact).norm() / exact.norm()))
print(torch.ops.permllm.cuda_architectures())
print(fallback_reason(torch.device("cuda"), torch.bfloat16))
"""


def test_compilers_warn_of_nothing_and_spill_little(library):
    if "ptxas info" not in library.log:
        pytest.skip(f"the objects are from a build without {OUTPUT}: remove build/objects/cuda")
    assert not remarks(library.log)
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill stores", library.log)]
    assert spills
    assert max(spills) <= LARGEST_SPILL


def remarks(log):
    return [line for line in log.splitlines() if REMARK.search(line)]


def test_serialized_products_are_a_remark():
    """In the words of ptxas, among lines that say nothing of the kind."""
    serialized = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are "
        "serialized due to non wgmma instructions defining accumulator registers of a wgmma "
        "between start and end of the pipeline stage in the function 'f'"
    )
    warning = "csrc/cuda/a.h(3): warning #177-D: variable was declared but never referenced"
    plain = "ptxas info    : Used 168 registers, used 1 barriers"
    assert remarks("\n".join([plain, serialized, plain, warning])) == [serialized, warning]


@pytest.mark.parametrize(("name", "count"), OUR_KERNELS)
def test_holds_our_kernels_for_every_architecture(library, name, count):
    if "ptxas info" not in library.log:
        pytest.skip(f"the objects are from a build without {OUTPUT}: remove build/objects/cuda")
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", library.log)
    for architecture in ARCHITECTURES.split():
        assert len({entry for entry, target in compiled
                    if name in entry and target == architecture}) == count  # fmt: skip


def test_holds_the_gemm_of_cutlass(library):
    if "ptxas info" not in library.log:
        pytest.skip(f"the objects are from a build without {OUTPUT}: remove build/objects/cuda")
    compiled = re.findall(r"Compiling entry function '(\w+)' for 'sm_90a'", library.log)
    name, count = GEMM
    assert len({entry for entry in compiled if name in entry}) == count


def test_needs_the_stable_shim_alone(library):
    """One library then serves every PyTorch from 2.11 on, and one without CUDA."""
    headers = Path(torch.__file__).parent / "include" / "torch" / "csrc"
    stable = set(re.findall(r"\w+", "".join((headers / name).read_text() for name in SHIMS)))
    table = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library.path)],
        check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    kinds_and_names = [line.split() for line in table.splitlines()]
    # With a version, after an @, they are of the C and C++ runtimes; weak ones may be missing.
    needed = {name for kind, name in kinds_and_names if kind == "U" and "@" not in name}
    assert needed
    assert needed <= stable


def test_links_no_library_of_cuda(library):
    dynamic = subprocess.run(
        ["readelf", "-d", str(library.path)], check=True, capture_output=True, text=True
    ).stdout
    needed = set(re.findall(r"\(NEEDED\).*\[(.*\.so)[.\d]*\]", dynamic))
    assert "libtorch_cpu.so" in needed
    assert needed <= LIBRARIES


def test_serves_on_the_cpu_beside_it(library, tmp_path):
    """In a process of its own, in a package that holds both libraries."""
    package = tmp_path / "permllm_vllm"
    package.mkdir()
    for entry in (ROOT / "permllm_vllm").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / library.path.name).unlink(missing_ok=True)
    (package / library.path.name).symlink_to(library.path)
    result = subprocess.run(
        [sys.executable, "-c", SERVE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))},
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    file, product, architectures, reason = result.stdout.splitlines()
    assert Path(file).parent == package
    backend, error = product.split()
    assert backend == ("cpu" if (package / "_C.so").exists() else "reference")
    assert float(error) < 5e-3
    assert architectures == ARCHITECTURES
    if not torch.cuda.is_available():
        assert "torch.cuda.is_available() is false" in reason


def test_the_toolkit_of_this_build_is_found():
    """So that a skip above is not for a reason that nobody reads."""
    if toolkit.nvcc() is None:
        pytest.skip("needs nvcc: install the CUDA toolkit")
    assert toolkit.library_directories()
