"""Times the sparse kernels against the dense paths of PyTorch and vLLM.

    python -m benchmarks.kernels --device cpu --threads 1 --json results.json
    python -m benchmarks.kernels --device cuda --json results.json    # benchmarks/cuda_kernels.py

Every contestant runs in this process, call by call in turn, over enough copies of its weight that
none of them is in the cache. One thread is timed in thread-CPU time, more of them in wall time;
numbers are medians.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import cuda_kernels
from benchmarks.machine import write_json
from benchmarks.shapes import LLAMA_2_7B, TOKENS, Layer, random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend

OURS = "permllm"
POOL_BYTES = 320 << 20  # of one contestant's weights: many times the cache
Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours."""

    n: int
    k: int
    m: int
    pattern: str
    value_dtype: str
    isa: str
    threads: int
    peer: str
    peer_us: float
    ours_us: float
    ratio: float
    ours_gflops: float
    relative_error: float


class Contestant:
    """One way to multiply, with copies of the weight that are used in turn."""

    def __init__(self, weight_bytes: int, make: Callable[[], Call]):
        self._copies = max(2, math.ceil(POOL_BYTES / weight_bytes))
        self._calls = itertools.cycle([make() for _ in range(self._copies)])

    def warm(self, x: Tensor) -> None:
        """Reads every copy once: the first read after allocation is not what is measured."""
        for _ in range(self._copies):
            next(self._calls)(x)

    def time(self, x: Tensor, clock: Callable[[], float]) -> float:
        call = next(self._calls)
        start = clock()
        call(x)
        return clock() - start

    def result(self, x: Tensor) -> Tensor:
        return next(self._calls)(x)


def _torch_linear(dense: Tensor) -> Call:
    weight = dense.clone()
    return lambda x: torch.nn.functional.linear(x, weight)


def _vllm_linear(dense: Tensor) -> Call:
    """vLLM's choice for a dense layer on this CPU (onednn_mm for all but small weights)."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(dense.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _sparse_linear(layer: Layer, backend: CpuBackend) -> Call:
    packed = backend.pack(layer.weights)
    n, pattern = layer.dense.shape[0], str(layer.weights.pattern)

    def call(x: Tensor) -> Tensor:
        return ops.sparse_linear(
            x, packed.packed, packed.metadata, packed.permutation, None, None, n, pattern
        )

    return call


def peers(console: Console) -> dict[str, Callable[[Tensor], Call]]:
    """Dense contestants by name; vLLM's only where vLLM is installed."""
    found: dict[str, Callable[[Tensor], Call]] = {"torch": _torch_linear}
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError as error:
        console.print(f"no peer vllm: {error}", style="yellow")
    else:
        found["vllm"] = _vllm_linear
    return found


def relative_error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Frobenius error against float64 over the first rows of the weight."""
    rows = min(dense.shape[0], 512)
    exact = x.double() @ dense[:rows].double().t()
    return float((y[:, :rows].double() - exact).norm() / exact.norm())


def measure(
    shape: tuple[int, int],
    pattern: str,
    tokens: list[int],
    threads: int,
    makers: dict[str, Callable[[Tensor], Call]],
    quick: bool,
) -> Iterator[Row]:
    """Compares one weight shape with every peer, for every number of tokens."""
    n, k = shape
    backend = CpuBackend()
    layer = random_layer(n, k, pattern, 64 if k % 64 == 0 else 32, permuted=k % 32 == 0)
    dense_bytes = n * k * 2
    contestants = {
        name: Contestant(dense_bytes, lambda make=make: make(layer.dense))  # type: ignore[misc]
        for name, make in makers.items()
    }
    contestants[OURS] = Contestant(dense_bytes // 2, lambda: _sparse_linear(layer, backend))
    for contestant in contestants.values():
        contestant.warm(torch.zeros(1, k, dtype=torch.bfloat16))
    clock = time.thread_time if threads == 1 else time.perf_counter
    for m in tokens:
        x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(torch.bfloat16)
        error = relative_error(contestants[OURS].result(x), x, layer.dense)
        rounds = (5 if quick else 9) if m > 16 else (9 if quick else 25)
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for turn in range(rounds + 1):
            for name, contestant in contestants.items():
                seconds = contestant.time(x, clock)
                if turn > 0:  # the first call allocates
                    times[name].append(seconds)
        median = {name: statistics.median(values) * 1e6 for name, values in times.items()}
        for peer in makers:
            yield Row(
                n=n,
                k=k,
                m=m,
                pattern=pattern,
                value_dtype="bfloat16",
                isa=backend.instruction_set,
                threads=threads,
                peer=peer,
                peer_us=round(median[peer], 1),
                ours_us=round(median[OURS], 1),
                ratio=round(median[peer] / median[OURS], 3),
                ours_gflops=round(2 * m * n * k / median[OURS] / 1e3, 1),
                relative_error=float(f"{error:.2e}"),
            )


def table(rows: list[Row]) -> Table:
    """One line per shape and token count; the ratio is that to the fastest peer."""
    first = rows[0]
    names = list(dict.fromkeys(row.peer for row in rows))
    result = Table(title=f"{first.isa}, bfloat16, {first.threads} thread(s), times in microseconds")
    for column in ("N x K", "pattern", "M", *names, OURS, "ratio to fastest"):
        result.add_column(column, justify="right")
    groups: dict[tuple[int, int, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.n, row.k, row.pattern, row.m), []).append(row)
    for (n, k, pattern, m), group in groups.items():
        times = [f"{row.peer_us:.0f}" for row in group]
        fastest = min(row.ratio for row in group)
        result.add_row(
            f"{n}x{k}", pattern, str(m), *times, f"{group[0].ours_us:.0f}", f"{fastest:.2f}x"
        )
    return result


def _shape(text: str) -> tuple[int, int]:
    n, _, k = text.partition("x")
    return int(n), int(k)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", type=_shape, nargs="+", metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--pattern", nargs="+", choices=["2:4", "4:8"], default=["2:4"])
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


def main() -> None:
    """Measures, prints a table, writes JSON."""
    arguments = _parse()
    if arguments.device == "cuda":
        return cuda_kernels.run(arguments.shapes, arguments.m, json_file=arguments.json)
    shapes, tokens = arguments.shapes or LLAMA_2_7B, arguments.m or list(TOKENS)
    console = Console()
    torch.set_num_threads(arguments.threads)
    makers = peers(console)
    rows: list[Row] = []
    with torch.inference_mode():
        for shape, pattern in itertools.product(shapes, arguments.pattern):
            rows += measure(shape, pattern, tokens, arguments.threads, makers, arguments.quick)
    console.print(table(rows))
    if arguments.json:
        load = round(os.getloadavg()[1], 1)  # of five minutes: other work slows both sides
        write_json(arguments.json, {"load_average": load, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
