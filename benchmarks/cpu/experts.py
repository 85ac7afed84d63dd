"""Times the kernel of sparse experts against vLLM's own for dense ones.

A call multiplies the experts of one layer: what vLLM does with the same weights, zeros and all, in
bfloat16, and with AMX in int8 too (without AMD's zentorch, which would be another peer). Tokens are
spread evenly over the experts, and calls go through all of them in turn, so that no cache holds
those of the next call; contestants are called in turn.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cpu.conditions import conditions
from benchmarks.cpu.contestants import median_times, rounds_of
from benchmarks.cpu.expert_contestants import (
    OURS,
    contestants,
    random_experts,
)
from benchmarks.cpu.products import activations
from benchmarks.records.rows import Rows
from benchmarks.shapes import EXPERTS, VALUES
from permllm_vllm.backends.cpu import CpuBackend

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


def run(
    models: Sequence[str], tokens: Sequence[int], result: Rows, threads: int, quick: bool
) -> None:
    """Measure what the result lacks, and print a table.

    Args:
        models: keys of ``EXPERTS``.
    """
    with torch.inference_mode():
        for model in models:
            there = {row["m"] for row in result.all() if row["model"] == model}
            missing = [m for m in tokens if m not in there]
            if missing:
                for rows in measure(model, missing, threads, quick):
                    result.update(asdict(row) for row in rows)
    columns = Row.__dataclass_fields__
    found = [{c: row[c] for c in columns if c in row} for row in result.all()]
    Console().print(table([Row(**row) for row in found]))
