"""The CUDA sources can be captured into a graph: nothing waits, allocates or leaves the stream.

What can be said without a GPU: calls that stream capture forbids do not occur in the host code.
"""

import re
from pathlib import Path

import pytest

SOURCES = sorted(
    path
    for path in (Path(__file__).parents[2] / "csrc" / "cuda").iterdir()
    if path.suffix in {".cu", ".h", ".cpp"}
)
FORBIDDEN = re.compile(
    r"cuda(Malloc|Free|HostAlloc|MallocHost|DeviceSynchronize|StreamSynchronize|EventSynchronize"
    r"|StreamQuery|StreamCreate|StreamLegacy|StreamPerThread|Memset|Memcpy|DeviceReset)"
    r"|\.item\(|\.cpu\(|<<<"
)


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_nothing_that_capture_forbids(source: Path) -> None:
    code = re.sub(r"//.*", "", source.read_text())
    found = FORBIDDEN.search(code)
    assert found is None, found


def test_the_sources_were_found() -> None:
    assert {"bindings.cpp", "mma_linear.cu", "launch.h"} <= {path.name for path in SOURCES}


def test_launches_use_the_stream_they_are_given() -> None:
    launch = next(path for path in SOURCES if path.name == "launch.h").read_text()
    assert "configuration.stream = static_cast<cudaStream_t>(stream);" in launch
    tensors = next(path for path in SOURCES if path.name == "cuda_tensors.h").read_text()
    assert "current_cuda_stream" in tensors
