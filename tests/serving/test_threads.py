"""The kernels run on torch's threads in a process that serves with vLLM, as in plain Python.

The process is that of the engine, which runs its one worker itself. Other packages bring OpenMP
runtimes of their own, which may be mapped there and stay idle: what is promised is that this
library brings none, and that its calls start no thread.
"""

import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

THREADS = 2
OPENMP = re.compile(rb"GOMP_|omp_get_|__kmpc_|lib[gi]?omp")
"""In a library's table of names, where it needs an OpenMP runtime."""
RUNTIME = re.compile(r"/lib[gi]?omp[^/]*\.so")
"""In the path of an OpenMP runtime."""
OTHERS = {"scikit_learn.libs", "sentencepiece.libs"}
"""Folders of the runtimes that other packages bring to what vLLM and Transformers import."""


class Look(NamedTuple):
    """Files that a process maps, and its threads: at first, after a dense layer, and a sparse."""

    files: set[str]
    first: set[str]
    dense: set[str]
    sparse: set[str]


def look() -> Look:
    """Multiply with two threads in the process that this is called in."""
    layer = random_layer(1024, 1024)
    x = torch.randn(64, 1024).bfloat16()
    first, before = threads(), torch.get_num_threads()
    torch._C.set_num_threads(THREADS)  # vLLM puts its own function in the place of torch's
    try:
        torch.nn.functional.linear(x, layer.dense.bfloat16()).exp()
        dense = threads()
        packed = CpuBackend().pack(layer.weights)
        ops.sparse_linear(x, packed.packed, packed.metadata, None, None, None, 1024, "2:4")
        maps = Path("/proc/self/maps").read_text().splitlines()
        return Look({line.rpartition(" ")[2] for line in maps}, first, dense, threads())
    finally:
        torch._C.set_num_threads(before)


def threads() -> set[str]:
    return set(os.listdir("/proc/self/task"))


def test_an_engine_runs_no_openmp_runtime_but_torch_s(engines: Engines, tiny: Twins) -> None:
    assert engines.run(tiny.sparse, PROMPTS, dtype="bfloat16").backends == {"cpu bfloat16": 8}
    found = engines.call(look)
    (library,) = {file for file in found.files if file.endswith("permllm_vllm/_C.so")}
    assert OPENMP.search(Path(library).read_bytes()) is None
    runtimes = {Path(file).parent for file in found.files if RUNTIME.search(file)}
    torch_s = Path(torch.__file__).parent / "lib"
    assert {folder for folder in runtimes if folder.name not in OTHERS} == {torch_s}
    assert found.dense > found.first
    assert found.sparse <= found.dense
