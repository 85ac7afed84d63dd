"""What `benchmarks.kernels` records, and the bounds that the best rates of a run set.

    python -m benchmarks.cpu.kernel_rows RESULT    # its bounds anew, from its own times

Measures nothing: date, machine and times of the result stay as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

VALUE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True)
class InHugePages:
    """A peer in huge pages: median microseconds, and how much of its weights lay in such pages."""

    us: float
    mib: float


#: By (outputs, inputs, tokens, peer).
PeerTimes = dict[tuple[int, int, int, str], InHugePages]


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours.

    Attributes:
        peer_values: dtype of the peer's weight, int8 or that of the activations; the ratios that
            count are those to the latter.
        peer_huge_pages_us: the peer in huge pages, in another process; None if not measured.
        peer_huge_pages_mib: memory in huge pages that process gained with the copies of the peer's
            weight; None if it was not looked at.
        plain_reading_us: reading our packed bytes as fast as what does nothing else
            (`benchmarks.cpu.stream`).
        stream_floor_us: reading them at the best rate at which anything but our kernels read in the
            result: the same, or a peer its weight (computed).
        ideal_dense_us: a dense kernel of the activations' dtype that reads at that best rate, or
            multiplies at the best rate of any dense peer, whichever takes longer (computed).
        relative_error: Frobenius, against float64 with the weight that was packed.
        load_average, small_pages: of `benchmarks.cpu.conditions`; the second is
            None in older results.
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
    plain_reading_us: float
    stream_floor_us: float
    ideal_dense_us: float
    ours_gflops: float
    relative_error: float
    load_average: float
    peer_huge_pages_mib: float | None = None
    small_pages: float | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Row:
        """The row of a result; what `records.rows` notes of its making is left out."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    def written(self) -> dict[str, Any]:
        """The row as a result holds it; what was not looked at is left out."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in LATER or value is not None
        }


LATER = ("peer_huge_pages_mib", "small_pages")
"""What older results do not have."""
KEY = ("n", "k", "m", "pattern", "value_dtype", "peer")


def complete(rows: Sequence[Row], huge_pages: PeerTimes | None = None) -> list[Row]:
    """Fill in the peers in huge pages where they are given, and the bounds of all rows."""
    rows = [
        replace(row, peer_huge_pages_us=round(given.us, 1), peer_huge_pages_mib=given.mib)
        if given is not None
        else row
        for row, given in ((r, (huge_pages or {}).get((r.n, r.k, r.m, r.peer))) for r in rows)
    ]
    reading = max(rate for row in rows for rate in reading_rates(row))
    dense = [row for row in rows if row.peer_values != "int8"]
    products = max(r.m * r.n * r.k / r.peer_us for r in dense)
    value_bytes = VALUE_BYTES[dense[0].peer_values]
    return [
        replace(
            row,
            stream_floor_us=round(row.packed_bytes / reading, 1),
            ideal_dense_us=round(row.n * row.k * max(value_bytes / reading, row.m / products), 1),
        )
        for row in rows
    ]


def reading_rates(row: Row) -> list[float]:
    """Bytes per microsecond at which a row shows that others than our kernels read memory."""
    dense = row.n * row.k * VALUE_BYTES[row.peer_values]
    rates = [row.packed_bytes / row.plain_reading_us, dense / row.peer_us]
    if row.peer_huge_pages_us is not None:
        rates.append(dense / row.peer_huge_pages_us)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path, help="of benchmarks.kernels; rewritten")
    path: Path = parser.parse_args().result
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = complete([Row.read(row) for row in result["rows"]])
    together = zip(result["rows"], rows, strict=True)
    result["rows"] = [{**old, **row.written()} for old, row in together]
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
