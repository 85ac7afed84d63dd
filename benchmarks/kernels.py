"""Times the sparse kernels against the dense paths of PyTorch and vLLM.

    python -m benchmarks.kernels --device cpu --threads 1 --json results.json
    python -m benchmarks.kernels --device cuda --json results.json    # benchmarks/cuda_kernels.py

Every contestant runs in this process, call by call in turn, over enough copies of its weight that
none of them is in the cache; the peers with huge pages run in a second process. One thread is timed
in thread-CPU time, more of them in wall time; numbers are medians.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import cuda_kernels
from benchmarks.cpu_contestants import (
    VLLM_INT8,
    Contestant,
    activations,
    dense_contestants,
    dense_makers,
    int8_makers,
    median_times,
    rounds_of,
    sparse_linear,
)
from benchmarks.cpu_limits import PeerTimes, stream_rate, times_with_huge_pages
from benchmarks.machine import write_json
from benchmarks.shapes import LLAMA_2_7B, TOKENS, random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend

VALUES = ("bfloat16", "int8")


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours.

    Attributes:
        peer_values: dtype of the peer's weight; the ratios that count are those to bfloat16.
        peer_huge_pages_us: the peer in huge pages, in another process; None if not measured.
        stream_floor_us: reading our packed bytes at the rate of memory.
        ideal_dense_us: a dense bfloat16 kernel that reads at the rate of memory, or multiplies at
            the best rate of any dense peer in this run, whichever takes longer (computed).
        relative_error: Frobenius, against float64 with the weight that was packed.
    """

    n: int
    k: int
    m: int
    pattern: str
    value_dtype: str
    isa: str
    threads: int
    peer: str
    peer_values: str
    peer_us: float
    peer_huge_pages_us: float | None
    ours_us: float
    ratio: float
    packed_bytes: int
    stream_floor_us: float
    ideal_dense_us: float
    ours_gflops: float
    relative_error: float


def relative_error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Frobenius error against float64 over the first rows of the weight."""
    rows = min(dense.shape[0], 512)
    exact = x.double() @ dense[:rows].double().t()
    return float((y[:, :rows].double() - exact).norm() / exact.norm())


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    shapes: list[tuple[int, int]]
    tokens: list[int]
    patterns: list[str]
    values: list[str]
    threads: int
    quick: bool


def measure(shape: tuple[int, int], pattern: str, plan: Plan) -> Iterator[Row]:
    """Compares one weight shape with every peer, for every number of tokens.

    What only a whole run knows is left empty in the rows.
    """
    n, k = shape
    backend = CpuBackend()
    drawn = random_layer(n, k, pattern, 64 if k % 64 == 0 else 32, permuted=k % 32 == 0)
    layers = {"bfloat16": drawn, "int8": to_int8(drawn)}
    makers = dense_makers() | (int8_makers() if "int8" in plan.values else {})
    contestants = dense_contestants(makers, drawn.dense)
    packed_bytes = {}
    for values in plan.values:
        layer = layers[values]
        packed_bytes[values] = backend.pack(layer.weights).packed.numel()
        ours = Contestant(packed_bytes[values], lambda layer=layer: sparse_linear(layer, backend))  # type: ignore[misc]
        ours.warm(torch.zeros(1, k, dtype=torch.bfloat16))
        contestants[_ours(values)] = ours
    for m in plan.tokens:
        x = activations(m, k)
        times = median_times(contestants, x, plan.threads, rounds_of(m, plan.quick))
        for values in plan.values:
            ours_us = times[_ours(values)]
            y = contestants[_ours(values)].result(x)
            error = relative_error(y, x, layers[values].dense)
            for peer in makers:
                if values != "int8" and peer == VLLM_INT8:
                    continue
                yield Row(
                    n=n,
                    k=k,
                    m=m,
                    pattern=pattern,
                    value_dtype=values,
                    isa=backend.instruction_set,
                    threads=plan.threads,
                    peer=peer,
                    peer_values="int8" if peer == VLLM_INT8 else "bfloat16",
                    peer_us=round(times[peer], 1),
                    peer_huge_pages_us=None,
                    ours_us=round(ours_us, 1),
                    ratio=round(times[peer] / ours_us, 3),
                    packed_bytes=packed_bytes[values],
                    stream_floor_us=0.0,
                    ideal_dense_us=0.0,
                    ours_gflops=round(2 * m * n * k / ours_us / 1e3, 1),
                    relative_error=float(f"{error:.2e}"),
                )


def _ours(values: str) -> str:
    return f"permllm {values}"


def complete(rows: list[Row], stream: float, huge_pages: PeerTimes) -> list[Row]:
    """Fills in the bounds, from the best rates of the run, and the peers in huge pages.

    `stream` is in bytes per microsecond.
    """
    best = max(r.m * r.n * r.k / r.peer_us for r in rows if r.peer_values == "bfloat16")
    return [
        replace(
            row,
            stream_floor_us=round(row.packed_bytes / stream, 1),
            ideal_dense_us=round(row.n * row.k * max(2 / stream, row.m / best), 1),
            peer_huge_pages_us=_rounded(huge_pages.get((row.n, row.k, row.m, row.peer))),
        )
        for row in rows
    ]


def _rounded(microseconds: float | None) -> float | None:
    return None if microseconds is None else round(microseconds, 1)


def table(rows: list[Row], values: str) -> Table:
    """One line per shape and token count; the ratios are ours to what the column names."""
    rows = [row for row in rows if row.value_dtype == values]
    first = rows[0]
    names = list(dict.fromkeys(row.peer for row in rows))
    result = Table(
        title=f"{first.isa}, {values} values, {first.threads} thread(s), times in microseconds",
        caption="ratios to the fastest dense bfloat16 peer, to it in huge pages, to an ideal dense "
        "kernel; share of the memory's rate",
    )
    columns = ("N x K", "pattern", "M", *names, "permllm", "ratio", "huge pages", "ideal", "memory")
    for column in columns:
        result.add_column(column, justify="right")
    groups: dict[tuple[int, int, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.n, row.k, row.pattern, row.m), []).append(row)
    for (n, k, pattern, m), group in groups.items():
        ours = group[0].ours_us
        dense = [row for row in group if row.peer_values == "bfloat16"]
        huge = [row.peer_huge_pages_us for row in dense if row.peer_huge_pages_us is not None]
        result.add_row(
            *(f"{n}x{k}", pattern, str(m), *(f"{row.peer_us:.0f}" for row in group)),
            *(f"{ours:.0f}", f"{min(row.ratio for row in dense):.2f}x"),
            f"{min(huge) / ours:.2f}x" if huge else "",
            *(f"{dense[0].ideal_dense_us / ours:.2f}x", f"{dense[0].stream_floor_us / ours:.0%}"),
        )
    return result


def run(plan: Plan, huge_pages: bool) -> list[Row]:
    """Every row of the plan."""
    torch.set_num_threads(plan.threads)
    rows: list[Row] = []
    rates = [stream_rate(plan.threads)]
    with torch.inference_mode():
        for shape, pattern in itertools.product(plan.shapes, plan.patterns):
            rows += measure(shape, pattern, plan)
            rates.append(stream_rate(plan.threads))
    times: PeerTimes = {}
    if huge_pages:
        times = times_with_huge_pages(plan.shapes, plan.tokens, plan.threads, quick=True)
    return complete(rows, max(rates), times)


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
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--no-huge-pages", action="store_true", help="leave out the peers in huge pages"
    )
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    return parser.parse_args()


def main() -> None:
    """Measures, prints tables, writes JSON."""
    arguments = _parse()
    if arguments.device == "cuda":
        return cuda_kernels.run(arguments.shapes, arguments.m, json_file=arguments.json)
    plan = Plan(
        shapes=arguments.shapes or list(LLAMA_2_7B),
        tokens=arguments.m or list(TOKENS),
        patterns=arguments.pattern,
        values=arguments.values,
        threads=arguments.threads,
        quick=arguments.quick,
    )
    console = Console()
    rows = run(plan, huge_pages=not arguments.no_huge_pages)
    for values in plan.values:
        console.print(table(rows, values))
    if arguments.json:
        load = round(os.getloadavg()[1], 1)  # of five minutes: other work slows both sides
        write_json(arguments.json, {"load_average": load, "rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
