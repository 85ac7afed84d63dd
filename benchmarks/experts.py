"""Times the kernel of sparse experts against vLLM's own for dense ones.

    python -m benchmarks.experts --threads 1 --json results.json
    python -m benchmarks.experts --models olmoe-1b-7b --tokens 1 16 --quick    # something small

A call multiplies the experts of one layer: what vLLM does with the same weights, zeros and all, in
bfloat16, and with AMX in int8 too (without AMD's zentorch, which would be another peer). Tokens are
spread evenly over the experts, and calls go through all of them in turn, so that no cache holds
those of the next call; contestants are called in turn. One thread is timed in thread-CPU time, more
of them in wall time; numbers are medians.

The result is written after each number of tokens; one that it holds is not measured again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu.conditions import conditions, warn
from benchmarks.cpu.contestants import median_times, rounds_of
from benchmarks.cpu.expert_contestants import (
    OURS,
    contestants,
    random_experts,
)
from benchmarks.cpu.products import activations
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from benchmarks.shapes import EXPERTS, VALUES
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend

TOKENS = (1, 4, 16, 64, 256)
KEY = ("model", "values", "m", "peer")


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours.

    Attributes:
        values: of the sparse experts.
        gigabytes_per_second: at which our kernel reads the weights of the experts that the tokens
            go to, in units of 1e9 bytes.
        relative_error: of our kernel; Frobenius, against float64.
        load_average, small_pages: of `benchmarks.cpu.conditions`.
    """

    model: str
    values: str
    experts: int
    choices: int
    hidden: int
    inner: int
    m: int
    isa: str
    threads: int
    peer: str
    peer_us: float
    ours_us: float
    ratio: float
    gigabytes_per_second: float
    relative_error: float
    load_average: float
    small_pages: float | None = None


def measure(model: str, tokens: Sequence[int], threads: int, quick: bool) -> Iterator[list[Row]]:
    """Compare the experts of a model; yields the rows of one number of tokens at a time.

    Raises:
        WrongProduct: a contestant multiplies by something else.
    """
    shape = EXPERTS[model]
    found = contestants(random_experts(shape))
    for m in tokens:
        x = activations(m, shape.hidden)
        times = median_times(found, x, threads, rounds_of(m, quick))
        hit = min(m * shape.choices, shape.experts) / shape.experts
        yield [
            Row(
                model=model,
                values=values,
                **asdict(shape),
                m=m,
                isa=CpuBackend(values=getattr(torch, values)).instruction_set,
                threads=threads,
                peer=peer,
                peer_us=round(times[peer], 1),
                ours_us=round(times[ours], 1),
                ratio=round(times[peer] / times[ours], 3),
                gigabytes_per_second=round(hit * found[ours].weight_bytes / times[ours] / 1e3, 1),
                relative_error=float(f"{found[ours].checked(x):.2e}"),
                **conditions(),
            )
            for values, ours in ((values, f"{OURS} {values}") for values in VALUES)
            for peer in found
            if not peer.startswith(OURS)
        ]


def table(rows: Sequence[Row]) -> Table:
    """One line per model, kind of values, number of tokens and peer."""
    result = Table(title=f"{rows[0].isa}, {rows[0].threads} thread(s), times in microseconds")
    for column in ("model", "values", "M", "peer", "peer's", "permllm", "ratio", "GB/s"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            *(row.model, row.values, str(row.m), row.peer, f"{row.peer_us:.0f}"),
            *(f"{row.ours_us:.0f}", f"{row.ratio:.2f}x", f"{row.gigabytes_per_second:.1f}"),
        )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--models", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument(
        "--tokens", type=int, nargs="+", metavar="M", default=list(TOKENS),
        help=f"default: {' '.join(map(str, TOKENS))}",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="where the rows are kept, of one thread count"
    )
    return parser


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the command where nothing can be measured with them."""
    arguments = parser.parse_args()
    if min(arguments.tokens) < 1:
        parser.error(f"--tokens {min(arguments.tokens)}: give at least 1")
    if ops.missing_reason:
        sys.exit(f"benchmarks.experts: the compiled kernels are missing: {ops.missing_reason}")
    return arguments


def _run(arguments: argparse.Namespace, result: Rows) -> None:
    """Measure what the result lacks."""
    with torch.inference_mode():
        for model in arguments.models:
            there = {row["m"] for row in result.all() if row["model"] == model}
            tokens = [m for m in arguments.tokens if m not in there]
            if tokens:
                for rows in measure(model, tokens, arguments.threads, arguments.quick):
                    result.update(asdict(row) for row in rows)


def main() -> None:
    """Measures what the result lacks, prints a table, writes JSON."""
    parser = _parser()
    arguments = _checked(parser)
    torch.set_num_threads(arguments.threads)
    facts = {
        "isa": CpuBackend().instruction_set,
        "threads": arguments.threads,
        "rounds": rounds_of(1, arguments.quick),
    }
    columns = Row.__dataclass_fields__
    with kept_rows(parser, arguments.json, facts, KEY) as result:
        warn()
        _run(arguments, result)
        found = [{c: row[c] for c in columns if c in row} for row in result.all()]
        Console().print(table([Row(**row) for row in found]))


if __name__ == "__main__":
    main()
