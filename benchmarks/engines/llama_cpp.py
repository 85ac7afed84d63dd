"""llama.cpp in the place of an engine: what else serves on a CPU, without vLLM."""

import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf

from benchmarks.engines import gguf_twin
from benchmarks.engines.engine import RESERVED_CORES, SETTLING_SECONDS, Answers, EngineError
from benchmarks.engines.identity import identity

PROGRAMS = BENCH, QUANTIZE = "llama-batched-bench", "llama-quantize"
VARIANTS = {f"llama.cpp {kind}": kind for kind in gguf_twin.KINDS}
BITS = 16
"""Of a value of the dense model."""


def program(name: str, folder: Path | None) -> Path:
    """Where one of llama.cpp's programs is.

    Raises:
        FileNotFoundError: it is neither in `folder` nor, without one, on the path.
    """
    found = shutil.which(name, path=None if folder is None else str(folder))
    if found is None:
        raise FileNotFoundError(
            f"{name} was not found {'on the PATH' if folder is None else f'in {folder}'}: build "
            f"llama.cpp (cmake --build build --target {' '.join(PROGRAMS)}) and name its build/bin "
            "with --llama-cpp"
        )
    return Path(found)


def threads_beside_vllm() -> int:
    """As many threads as vLLM gives its kernels: the cores that it does not reserve."""
    reserved = int(os.environ.get(RESERVED_CORES, "1"))
    return max(1, len(os.sched_getaffinity(0)) - reserved)


class LlamaCpp:
    """llama.cpp's `llama-batched-bench`, which reads its model for every batch anew.

    It decodes tokens at random, so that nothing is sampled: what vLLM's sampler takes is not in its
    times. The model comes from the page cache, and what is before the first prompt is not timed.

    Args:
        bench: the program.
        model: a folder that `gguf_twin` made.
        threads: of its products.
        memory_limit: GiB; a batch that had more resident is refused.
    """

    def __init__(
        self, bench: Path, model: Path, *, threads: int, memory_limit: float | None = None
    ) -> None:
        self._bench, self._model, self._threads = bench, model, threads
        self._memory_limit = memory_limit
        self._peak_mib = 0.0

    def answers(self, batch: int, prompt: int, output: int) -> Answers:
        """Times of `batch` answers of `output` tokens to prompts of `prompt` tokens.

        Raises:
            EngineError: the program failed, or had more memory than the limit.
        """
        time.sleep(SETTLING_SECONDS)
        command = [
            *(str(self._bench), "--model", str(self._model / gguf_twin.FILE)),
            *("-npp", str(prompt), "-ntg", str(output), "-npl", str(batch)),
            *("--ctx-size", str(batch * (prompt + output)), "--output-format", "jsonl"),
            *("--threads", str(self._threads), "--threads-batch", str(self._threads)),
        ]
        with tempfile.TemporaryFile() as said:
            status, peak_mib = _run(command, said.fileno())
            said.seek(0)
            text = said.read().decode(errors="replace")
        self._peak_mib = max(self._peak_mib, peak_mib)
        if self._memory_limit is not None and peak_mib > 1024 * self._memory_limit:
            raise EngineError(f"{peak_mib:.0f} MiB are more than {self._memory_limit:g} GiB")
        found = re.search(r"^\{.*\}$", text, re.MULTILINE)
        if status or found is None:
            lines = " ".join(text.strip().splitlines()[-3:])
            raise EngineError(f"{self._bench.name} ended with status {status}: {lines}")
        times = json.loads(found[0])
        return Answers(float(times["t_pp"]), float(times["speed_tg"]))

    def facts(self) -> dict[str, Any]:
        """Which model it runs, its threads, memory and bytes.

        `peak_mib` is the most that a batch had resident, pages of the model's file included. Its KV
        cache is as large as the batch, and no larger.
        """
        return {
            "checkpoint": identity(self._model),
            "llama_cpp": self._version,
            "threads": self._threads,
            "peak_mib": self._peak_mib,
            **self._bytes,
        }

    def close(self) -> None:
        """Nothing runs between batches."""

    @cached_property
    def _version(self) -> str:
        done = subprocess.run(
            [self._bench, "--version"], capture_output=True, text=True, check=False
        )
        found = re.search(r"version: (.+)", done.stdout + done.stderr)
        return found[1] if found else "unknown"

    @cached_property
    def _bytes(self) -> dict[str, Any]:
        """Of the decoder's linear layers and of the head, here and in 16 bits."""
        tensors = gguf.GGUFReader(self._model / gguf_twin.FILE).tensors
        matrices = {one.name: one for one in tensors if len(one.shape) > 1}
        head = matrices.get("output.weight", matrices["token_embd.weight"])
        linears = [one for name, one in matrices.items() if name.startswith("blk.")]
        packed = sum(int(one.n_bytes) for one in linears)
        dense = sum(int(one.n_elements) * BITS // 8 for one in linears)
        return {
            "packed_bytes": packed,
            "dense_bytes": dense,
            "packed_ratio": packed / dense,
            "head_ratio": int(head.n_bytes) / (int(head.n_elements) * BITS // 8),
        }


def _run(command: list[str], output: int) -> tuple[int, float]:
    """Run a command; its exit status, and the most MiB that it had resident."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT) as process:
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / 1024
