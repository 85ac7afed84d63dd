"""Block size and Sinkhorn iterations: time and perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.records.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import Subject
from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.schema import BLOCK_SIZES

ITERATIONS = (5, 0)


def measure(subject: Subject, cells: Cells) -> None:
    """The reallocation, then learning from it, in blocks of each size."""
    cells.row({"method": "dense"}, subject.dense)
    for size in sorted(BLOCK_SIZES):
        key = {"method": "wanda+cp", "block_size": size}
        cells.row(key, partial(_reallocated, subject, size))
    for iterations in ITERATIONS:
        for size in sorted(BLOCK_SIZES):
            reallocated = {"method": "wanda+cp", "block_size": size}
            if "refused" in cells.row(reallocated, dict):
                continue
            key = {"method": "permllm-wanda", "block_size": size, "sinkhorn": iterations}
            cells.row(key, partial(_learned, subject, size, iterations))


def _reallocated(subject: Subject, size: int) -> dict[str, Any]:
    try:
        return subject.pruned(subject.recipe("wanda+cp", block_size=size))
    except OfflineError as error:
        return {"refused": str(error)}


def _learned(subject: Subject, size: int, iterations: int) -> dict[str, Any]:
    learning = {"sinkhorn_iterations": iterations}
    return subject.pruned(subject.recipe("permllm-wanda", block_size=size, learning=learning))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity by block size and iterations."""
    pruned = [row for row in rows if "block_size" in row and "perplexity" in row]
    labels = [
        f"{row['block_size']}, "
        + (f"{row['sinkhorn']} iterations" if "sinkhorn" in row else "CP alone")
        for row in pruned
    ]
    perplexity_bars(axes, pruned, labels)


STUDY = Study(
    "block size and Sinkhorn iterations", ("method", "block_size", "sinkhorn"), measure, draw
)
