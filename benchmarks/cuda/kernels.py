"""Times the kernels on a GPU against the dense and sparse paths of PyTorch.

    python -m benchmarks.cuda.kernels --json results.json

Every contestant is captured in a CUDA graph that calls it in turn with copies of its weight, so
many that none of them is in the second-level cache when its turn comes again. Numbers are medians
over replays. Needs PyTorch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.cuda.contestants import (
    CONTESTANTS,
    CUDA,
    DENSE,
    OURS,
    SPARSE_BYTES,
    UNPERMUTED,
    WEIGHT_BYTES,
    Call,
    permuted_dense,
)
from benchmarks.records.machine import write_json
from benchmarks.shapes import LLAMA_2_7B, random_layer
from permllm_vllm.backends import fallback_reason
from permllm_vllm.checkpoint import permutation as permutations

#: (outputs, inputs) of Llama-3-8B's linear layers as vLLM fuses them: qkv, o, gate_up, down.
LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SHAPES = tuple(dict.fromkeys((*LLAMA_2_7B, *LLAMA_3_8B)))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Of the permutation alone; 2048 x 4096 is the paper's (Table 3).
PERMUTED = tuple((tokens, k) for tokens in (1024, 2048, 4096) for k in (4096, 11008))


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant on one shape; times are medians in microseconds."""

    n: int
    k: int
    tokens: int
    contestant: str
    us: float
    floor_us: float
    """Bytes of weight, activations and result over the measured bandwidth of a copy."""
    relative_error: float


def time_graph(calls: Sequence[Call], x: Tensor, repeats: int) -> float:
    """Median microseconds of one call, of graphs that make each of `calls` once, in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(tensor_bytes: int) -> int:
    """Copies of a tensor that the cache cannot hold, and at least eight calls per graph."""
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    return max(8, math.ceil(4 * cache / tensor_bytes))


def bandwidth() -> float:
    """Bytes per microsecond of a copy of 1 GiB, reading and writing counted."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    us = time_graph([lambda x: target.copy_(x)] * 2, source, 10)
    return 2 * source.numel() / us


def relative_error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Frobenius error against float64, over the first rows and tokens."""
    exact = x[:64].double() @ dense[:512].double().t()
    return float((y[:64, :512].double() - exact).norm() / exact.norm())


def measure(
    n: int, k: int, tokens: Sequence[int], names: Sequence[str], speed: float
) -> Iterator[Row]:
    """Times every contestant on one shape; one that cannot run is left out, with a line why."""
    layer = random_layer(n, k)
    for name in names:
        try:
            calls = [CONTESTANTS[name](layer) for _ in range(copies(n * k // 2))]
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            print(f"{n} x {k}: no {name}: {_first_line(error)}")
            continue
        reference = permuted_dense(layer)[0] if name == UNPERMUTED else layer.dense.to(CUDA)
        for m in tokens:
            x = torch.randn(m, k, device=CUDA).bfloat16()
            weight_bytes = n * k * WEIGHT_BYTES.get(name, SPARSE_BYTES)
            try:
                error_now = relative_error(calls[0](x), x, reference)
                us = time_graph(calls, x, 5 if m > 1024 else 15)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{n} x {k}, {m} tokens: no {name}: {_first_line(error)}")
                continue
            yield Row(
                n=n,
                k=k,
                tokens=m,
                contestant=name,
                us=round(us, 2),
                floor_us=round((weight_bytes + 2 * m * (n + k)) / speed, 2),
                relative_error=float(f"{error_now:.2e}"),
            )
        del calls
        torch.cuda.empty_cache()


def measure_permutation(tokens: int, k: int) -> dict[str, float]:
    """The permutation kernel against indexing with PyTorch, in microseconds.

    Each call reads other activations, which the cache has forgotten.
    """
    layer = random_layer(8, k)
    assert layer.weights.permutation is not None
    absolute = permutations.absolute(layer.weights.permutation, 64).to(CUDA)
    places = (absolute % 128).to(torch.uint8)
    inputs = [torch.randn(tokens, k, device=CUDA).bfloat16() for _ in range(copies(2 * tokens * k))]
    x = inputs[0]
    ours = [lambda _, y=y: torch.ops.permllm.permute_inputs(y, places) for y in inputs]
    theirs = [lambda _, y=y: y[:, absolute] for y in inputs]
    result = {"permllm": time_graph(ours, x, 15), "indexing": time_graph(theirs, x, 15)}
    return {"tokens": tokens, "k": k, **{name: round(us, 2) for name, us in result.items()}}


def slower_than_dense(rows: list[Row]) -> set[tuple[int, int, int]]:
    """The shapes and numbers of tokens, (n, k, tokens), where the operator is behind cuBLAS."""
    dense = {(row.n, row.k, row.tokens): row.us for row in rows if row.contestant == DENSE}
    return {
        case
        for row in rows
        if row.contestant == OURS
        and (case := (row.n, row.k, row.tokens)) in dense
        and row.us > dense[case]
    }


def table(rows: list[Row]) -> str:
    """A line per shape and number of tokens: times, and what the others take of ours.

    Lines end with a remark where the operator is slower than cuBLAS.
    """
    slower = slower_than_dense(rows)
    names = list(dict.fromkeys(row.contestant for row in rows))
    lines = ["  ".join([f"{'n x k':>12}", f"{'tokens':>6}", *(f"{name:>25}" for name in names)])]
    for (n, k, m), group in itertools.groupby(
        sorted(rows, key=lambda row: (row.n, row.k, row.tokens)),
        key=lambda row: (row.n, row.k, row.tokens),
    ):
        found = {row.contestant: row for row in group}
        ours = found.get(OURS)
        cells = []
        for name in names:
            row = found.get(name)
            if row is None or ours is None:
                cells.append(f"{'-':>25}")
            elif name == OURS:
                cells.append(f"{row.us:>10.1f} us {row.floor_us / row.us:>5.0%} floor")
            else:
                cells.append(f"{row.us:>14.1f} us {row.us / ours.us:>6.2f}x")
        remark = ["slower than dense"] if (n, k, m) in slower else []
        lines.append("  ".join([f"{f'{n} x {k}':>12}", f"{m:>6}", *cells, *remark]))
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def shape(text: str) -> tuple[int, int]:
    """Reads 12288x4096."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def run(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    contestants: Sequence[str] | None = None,
    json_file: str | None = None,
    seconds: float = 600,
) -> None:
    """Measures, begins no further shape after `seconds`, prints tables, writes JSON."""
    reason = fallback_reason(CUDA, torch.bfloat16)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    end = time.monotonic() + seconds
    speed = bandwidth()
    gpu = torch.cuda.get_device_name(CUDA)
    print(f"{gpu}, a copy moves {speed / 1e3:.0f} GB/s, bfloat16", flush=True)
    rows: list[Row] = []
    with torch.inference_mode():
        moves = [measure_permutation(m, k) for m, k in PERMUTED]
        for n, k in shapes or SHAPES:
            if time.monotonic() > end:
                print(f"no time is left for {n} x {k}")
                continue
            rows += measure(n, k, tokens or TOKENS, contestants or list(CONTESTANTS), speed)
            if json_file:
                result = {
                    "gpu": gpu,
                    "cuda": torch.version.cuda,
                    "copy_gb_per_s": round(speed / 1e3),
                    "permutation": moves,
                    "slower_than_dense": sorted(slower_than_dense(rows)),
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_json(json_file, result)
    for move in moves:
        ratio = move["indexing"] / move["permllm"]
        print(
            f"permuting {move['tokens']} x {move['k']}: {move['permllm']} us, indexing "
            f"{move['indexing']} us, {ratio:.1f}x"
        )
    print(table(rows))


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.kernels", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--seconds", type=float, default=600, help="begin no shape after them")
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    run(arguments.shapes, arguments.m, arguments.contestants, arguments.json, arguments.seconds)


if __name__ == "__main__":
    main()
