"""What was measured of kernels on a GPU: rows, what they say together, and what they lack."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Sequence

from benchmarks.cuda.contestants import DENSE, OURS, OWN

Case = tuple[int, int, int, str]
"""Outputs, inputs, tokens and a contestant."""


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

    @property
    def case(self) -> Case:
        """What no other row has."""
        return self.n, self.k, self.tokens, self.contestant


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


def missing(
    rows: Sequence[Row],
    tried: Collection[Case],
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    names: Sequence[str],
) -> list[Case]:
    """What has no row, of this project's contestants where any was asked for.

    Of peers, which not every PyTorch has, what was not tried.
    """
    there = {row.case for row in rows}
    needed = {name for name in names if name in OWN} or {*names}
    asked = [(n, k, m, name) for n, k in shapes for m in tokens for name in names]
    return [case for case in asked if case not in (there if case[-1] in needed else tried)]


def lines_of(cases: Sequence[Case]) -> list[str]:
    """A line for each shape and the contestants that lack the same numbers of tokens."""
    lacking: dict[tuple[int, int, str], list[int]] = {}
    for n, k, m, name in cases:
        lacking.setdefault((n, k, name), []).append(m)
    alike: dict[tuple[int, int, tuple[int, ...]], list[str]] = {}
    for (n, k, name), tokens in lacking.items():
        alike.setdefault((n, k, tuple(tokens)), []).append(name)
    return [
        f"{n} x {k}, {', '.join(map(str, tokens))} tokens: {'; '.join(names)}"
        for (n, k, tokens), names in alike.items()
    ]
