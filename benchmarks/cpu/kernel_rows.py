"""What `benchmarks.kernels` records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

KEY = ("n", "k", "m", "pattern", "value_dtype", "peer")


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours.

    Attributes:
        peer_values: dtype of the peer's weight, int8 or that of the activations; the ratios that
            count are those to the latter.
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
    ours_us: float
    ratio: float
    packed_bytes: int
    ours_gflops: float
    relative_error: float
    load_average: float
    small_pages: float | None = None

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> Row:
        """The row of a result; what older results and `records.rows` note beside is left out."""
        return cls(**{field.name: row[field.name] for field in fields(cls) if field.name in row})

    def written(self) -> dict[str, Any]:
        """The row as a result holds it."""
        return asdict(self)
