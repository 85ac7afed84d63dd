"""What a machine with one NVIDIA GPU can tell: builds, tests, generates with and times the kernels.

    python -m benchmarks.gpu

Needs PyTorch and pytest, and to build nvcc and CUTLASS (docs/cuda.md); no network. Results are
written to build/gpu, a table is printed last. The exit status is that of the tests.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SANITIZED = "every_weight or permute_inputs or strided"


def run(command: list[str], limit: int, **environment: str) -> int:
    """Runs a command for at most `limit` seconds; its exit status, or 124."""
    print("+", " ".join(command), flush=True)
    start = time.monotonic()
    try:
        status = subprocess.run(
            command, cwd=ROOT, timeout=limit, env={**os.environ, **environment}
        ).returncode
    except subprocess.TimeoutExpired:
        status = 124
    print(f"  exit status {status} after {time.monotonic() - start:.0f} s", flush=True)
    return status


def build() -> int:
    """Builds the libraries in place for the GPU of this machine."""
    major, minor = torch.cuda.get_device_capability()
    return run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        900,
        PERMLLM_BUILD_CUDA="1",
        PERMLLM_CUDA_ARCHS=os.environ.get("PERMLLM_CUDA_ARCHS", f"{major}{minor}"),
    )


def test() -> int:
    """Runs the GPU tests, then a part of them under compute-sanitizer."""
    pytest = [sys.executable, "-m", "pytest", "-q", "tests/cuda/test_gpu.py"]
    status = run(pytest, 240)
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer is not on the PATH: nothing was run under it")
        return status
    checked = run(
        [sanitizer, "--error-exitcode", "1", *pytest, "-k", SANITIZED],
        180,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    return status or checked


def main() -> None:
    """Runs everything; fails with the build or the tests."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--build", action="store_true", help="build even where a library is there")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--model", help="directory of a Llama; else random weights")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU: check nvidia-smi, and that PyTorch is one for CUDA")
    missing = not (ROOT / "permllm_vllm" / "_C_cuda.so").exists()
    if (missing or arguments.build) and build() != 0:
        raise SystemExit("the CUDA kernels do not build, see above")
    status = 0 if arguments.no_tests else test()
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    result = arguments.output / f"kernels-{name}.json"
    generation = arguments.output / f"generation-{name}.json"
    command = [sys.executable, "-m", "benchmarks.cuda_generation", "--json", str(generation)]
    run([*command, *(("--model", arguments.model) if arguments.model else ())], 180)
    command = [sys.executable, "-m", "benchmarks.cuda_kernels", "--json", str(result)]
    run([*command, "--seconds", "240"], 420)
    sys.exit(status)


if __name__ == "__main__":
    main()
