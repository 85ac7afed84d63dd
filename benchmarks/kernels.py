"""Times the sparse kernels against the dense paths of PyTorch and vLLM.

    python -m benchmarks.kernels --device cpu --threads 1 --json results.json
    python -m benchmarks.kernels --patterns 2:4 8:16 32:64 --json results.json
    python -m benchmarks.kernels --values bfloat16 int8 int4 --json results.json
    python -m benchmarks.kernels --dtype float16 --json float16.json
    python -m benchmarks.kernels --block-size 128 --json gathered.json
    python -m benchmarks.kernels --experts olmoe-1b-7b --json experts.json    # to vLLM's
    python -m benchmarks.kernels --device cuda --json results.json    # benchmarks/cuda/kernels.py

Every contestant runs in this process, call by call in turn, over enough copies of its weight that
none of them is in the cache. One thread is timed in thread-CPU time, more of them in wall time;
numbers are medians.

The result is written after each number of tokens; one that it holds for all values is not measured
again.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu import experts
from benchmarks.cpu.conditions import conditions, warn
from benchmarks.cpu.contestants import (
    VLLM_INT8,
    dense_contestants,
    median_times,
    peer_makers,
    rounds_of,
    sparse_contestant,
)
from benchmarks.cpu.kernel_rows import KEY, Row
from benchmarks.cpu.products import activations
from benchmarks.cuda import kernels as cuda_kernels
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from benchmarks.shapes import (
    EXPERTS,
    LLAMA_2_7B,
    TOKENS,
    VALUES,
    parse_shape,
    random_layer,
    to_int4,
    to_int8,
)
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint.pattern import SUPPORTED

DTYPES = ("bfloat16", "float16", "float32")
BLOCK_SIZES = (32, 64, 128)
INT4 = "int4"
OLDER = {"dtype": "bfloat16", "block_size": 64}
"""What results were measured with that do not say it."""
LAYERS_ALONE = ("shapes", "patterns", "values", "dtype", "block_size")
"""Options that experts have not."""
CPU_ALONE = ("threads", "quick", "experts", *LAYERS_ALONE[1:])
"""Options that the CUDA benchmark has not."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        dtype: of the activations and of the dense peers' weights.
        block_size: inputs of a permutation's block; of 128 and more, activations are gathered.
    """

    shapes: list[tuple[int, int]]
    tokens: list[int]
    patterns: list[str]
    values: list[str]
    threads: int
    quick: bool
    dtype: str = "bfloat16"
    block_size: int = 64

    def backend(self, values: str = "int8") -> CpuBackend:
        """What packs such values for these activations here."""
        stored = torch.bfloat16 if values == "bfloat16" else torch.int8
        return CpuBackend(dtype=getattr(torch, self.dtype), values=stored)


def measure(
    shape: tuple[int, int], pattern: str, tokens: Sequence[int], plan: Plan
) -> Iterator[list[Row]]:
    """Compare one shape with every peer; yields the rows of one number of tokens at a time."""
    n, k = shape
    dtype = getattr(torch, plan.dtype)
    block = plan.block_size if k % plan.block_size == 0 else 32
    drawn = random_layer(n, k, pattern, block, permuted=k % block == 0, by_magnitude=True)
    layers = {"bfloat16": drawn, "int8": to_int8(drawn), INT4: to_int4(drawn)}
    makers = peer_makers(int8=plan.values != ["bfloat16"] and plan.dtype == "bfloat16")
    contestants = dense_contestants(makers, drawn.dense.to(dtype))
    for values in plan.values:
        name = _ours(values)
        contestants[name] = sparse_contestant(name, layers[values], plan.backend(values), dtype)
    for m in tokens:
        x = activations(m, k, dtype)
        times = median_times(contestants, x, plan.threads, rounds_of(m, plan.quick))
        rows = []
        for values in plan.values:
            ours, ours_us = contestants[_ours(values)], times[_ours(values)]
            error = ours.checked(x)
            for peer in makers:
                if values == "bfloat16" and peer == VLLM_INT8:
                    continue
                rows.append(
                    Row(
                        n=n,
                        k=k,
                        m=m,
                        pattern=pattern,
                        value_dtype=values,
                        isa=plan.backend(values).instruction_set,
                        threads=plan.threads,
                        peer=peer,
                        peer_values="int8" if peer == VLLM_INT8 else plan.dtype,
                        peer_us=round(times[peer], 1),
                        ours_us=round(ours_us, 1),
                        ratio=round(times[peer] / ours_us, 3),
                        packed_bytes=ours.weight_bytes,
                        ours_gflops=round(2 * m * n * k / ours_us / 1e3, 1),
                        relative_error=float(f"{error:.2e}"),
                        **conditions(),
                    )
                )
        yield rows


def _ours(values: str) -> str:
    return f"permllm {values}"


def table(rows: list[Row], values: str) -> Table:
    """One line per shape and token count; the ratios are ours to what the column names."""
    rows = [row for row in rows if row.value_dtype == values]
    first = rows[0]
    names = list(dict.fromkeys(row.peer for row in rows))
    result = Table(
        title=f"{first.isa}, {values} values, {first.threads} thread(s), times in microseconds",
        caption="ratios to the fastest dense peer of the same dtype; GB/s of the packed weights",
    )
    columns = ("N x K", "pattern", "M", *names, "permllm", "ratio", "GB/s")
    for column in columns:
        result.add_column(column, justify="right")
    groups: dict[tuple[int, int, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.n, row.k, row.pattern, row.m), []).append(row)
    for (n, k, pattern, m), group in groups.items():
        ours = group[0].ours_us
        dense = [row for row in group if row.peer_values != "int8"]
        result.add_row(
            *(f"{n}x{k}", pattern, str(m), *(f"{row.peer_us:.0f}" for row in group)),
            *(f"{ours:.0f}", f"{min(row.ratio for row in dense):.2f}x"),
            f"{group[0].packed_bytes / ours / 1e3:.1f}",
        )
    return result


def run(plan: Plan, result: Rows) -> list[Row]:
    """Measure what the result lacks of the plan; returns all rows of the result."""
    torch.set_num_threads(plan.threads)
    with torch.inference_mode():
        for shape, pattern in itertools.product(plan.shapes, plan.patterns):
            there = {(row.n, row.k, row.pattern, row.m, row.value_dtype) for row in _rows(result)}
            tokens = [
                m
                for m in plan.tokens
                if any((*shape, pattern, m, values) not in there for values in plan.values)
            ]
            if tokens:
                for rows in measure(shape, pattern, tokens, plan):
                    result.update(row.written() for row in rows)
    return _rows(result)


def _rows(result: Rows) -> list[Row]:
    return [Row.read(row) for row in result.all()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="default: 1")
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK")
    parser.add_argument("--tokens", "--m", type=int, nargs="+", metavar="M")
    parser.add_argument("--patterns", nargs="+", choices=SUPPORTED, help="default: 2:4")
    parser.add_argument(
        "--values", nargs="+", choices=(*VALUES, INT4),
        help=f"default: {' and '.join(VALUES)}; {INT4} is int8 in 4 bits where kernels read these",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and dense peers")
    parser.add_argument(
        "--block-size", type=int, choices=BLOCK_SIZES, help="of permutations, default: 64"
    )
    parser.add_argument(
        "--experts", nargs="+", choices=list(EXPERTS), metavar="MODEL",
        help=f"the experts of a layer in place of linear layers: {', '.join(EXPERTS)}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", default=None, help="fewer repetitions")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the rows are kept, of one thread count, dtype and block size",
    )
    return parser


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the command where they do not go together."""
    arguments = parser.parse_args()
    _refuse(parser, arguments, "cuda", "--device cuda, only for the CPU", CPU_ALONE)
    if arguments.experts:
        _refuse(parser, arguments, "cpu", "--experts, only for linear layers", LAYERS_ALONE)
    if arguments.tokens and min(arguments.tokens) < 1:
        parser.error(f"--tokens {min(arguments.tokens)}: give at least 1")
    block = arguments.block_size
    for n, k in arguments.shapes or LLAMA_2_7B:
        if block is not None and k % block:
            parser.error(
                f"--block-size {block}: {n}x{k} has {k} inputs, no multiple of it: leave out the "
                "shape, or take another size"
            )
    return arguments


def _refuse(
    parser: argparse.ArgumentParser,
    arguments: argparse.Namespace,
    device: str,
    what: str,
    names: Sequence[str],
) -> None:
    """End the command where it has options that such a measurement has not."""
    given = [name for name in names if getattr(arguments, name) is not None]
    if arguments.device == device and given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        parser.error(f"{options}: not for {what}; leave it out")


def _run_experts(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    threads = 1 if arguments.threads is None else arguments.threads
    torch.set_num_threads(threads)
    quick = bool(arguments.quick)
    facts = {
        "isa": CpuBackend().instruction_set,
        "threads": threads,
        "rounds": rounds_of(1, quick),
    }
    with kept_rows(parser, arguments.json, facts, experts.KEY) as result:
        warn()
        experts.run(arguments.experts, arguments.tokens or list(TOKENS), result, threads, quick)


def main() -> None:
    """Measures, prints tables, writes JSON."""
    parser = _parser()
    arguments = _checked(parser)
    if arguments.device == "cuda":
        return cuda_kernels.run(arguments.shapes, arguments.tokens, json_file=arguments.json)
    if arguments.experts:
        return _run_experts(parser, arguments)
    plan = Plan(
        shapes=arguments.shapes or list(LLAMA_2_7B),
        tokens=arguments.tokens or list(TOKENS),
        patterns=arguments.patterns or ["2:4"],
        values=arguments.values or list(VALUES),
        threads=1 if arguments.threads is None else arguments.threads,
        quick=bool(arguments.quick),
        dtype=arguments.dtype or "bfloat16",
        block_size=arguments.block_size or 64,
    )
    facts = {
        "isa": plan.backend().instruction_set,
        "dtype": plan.dtype,
        "block_size": plan.block_size,
        "threads": plan.threads,
        "rounds": {"few tokens": rounds_of(1, plan.quick), "many": rounds_of(256, plan.quick)},
    }
    with kept_rows(parser, arguments.json, facts, KEY, OLDER) as result:
        warn()
        rows = run(plan, result)
    console = Console()
    for values in dict.fromkeys(row.value_dtype for row in rows):
        console.print(table(rows, values))


if __name__ == "__main__":
    main()
