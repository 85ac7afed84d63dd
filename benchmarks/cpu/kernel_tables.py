"""Tables of the documentation on the kernels."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.records.markdown import Result, Rows, markdown
from benchmarks.shapes import TOKENS

Row = Mapping[str, Any]
ByShape = Mapping[tuple[Any, ...], Row]
"""Rows by (outputs, inputs, pattern), value dtype and number of tokens."""
INTEGERS = ("int8", "int4")
"""Values that vLLM's dense int8 is compared with, too."""
AVX512_AIMS = {"bfloat16": (4.0, 1.7, 1.15, 1.05, 1.02), "int8": (6.0, 2.6, 2.3, 2.1, 2.05)}
AIMS = {
    "avx512_bf16": AVX512_AIMS,
    "zen5": AVX512_AIMS,
    "amx": {"bfloat16": (2.6, 2.6, 2.5, 2.5, 2.4), "int8": (4.5, 4.2, 4.0, 3.5, 3.0)},
}
"""Project targets: times as fast as dense bfloat16, one thread, at `TOKENS`, by instruction set."""


def fastest_peer(rows: Rows, peer_values: str, time: str = "peer_us") -> ByShape:
    """The row of the fastest peer, among those that have such a time."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["n"], row["k"], row["pattern"]), row["value_dtype"], row["m"]
        if row["peer_values"] != peer_values or row[time] is None:
            continue
        if key not in found or row[time] < found[key][time]:
            found[key] = row
    return found


@dataclass(frozen=True)
class Quantity:
    """What a line of a table shows of the rows of one value dtype, after the cells of its label."""

    rows: ByShape
    values: str
    label: Sequence[str]
    shown: Callable[[Row], float]
    missed: Callable[[Row], float | None] = lambda row: None
    """The aim that a row misses, which stands beside what is shown."""


def by_tokens(header: Sequence[str], quantities: Sequence[Quantity]) -> str:
    """A line per shape and quantity, a column per number of tokens."""
    keys = list(dict.fromkeys(key for quantity in quantities for key in quantity.rows))
    tokens = sorted({m for _, _, m in keys})
    several = len({pattern for (_, _, pattern), _, _ in keys}) > 1
    lines = []
    for n, k, pattern in dict.fromkeys(shape for shape, _, _ in keys):
        first = f"{n} x {k}, {pattern}" if several else f"{n} x {k}"
        for quantity in quantities:
            rows = [quantity.rows.get(((n, k, pattern), quantity.values, m)) for m in tokens]
            if any(rows):
                lines.append([first, *quantity.label, *(_cell(quantity, row) for row in rows)])
    return markdown(["N x K", *header, *(f"M = {m}" for m in tokens)], lines)


def _cell(quantity: Quantity, row: Row | None) -> str:
    if row is None:
        return ""
    aim = quantity.missed(row)
    return f"{quantity.shown(row):.2f}" + ("" if aim is None else f" ({aim:g})")


def aim_of(row: Row) -> float | None:
    """The aim of a row with a dense bfloat16 peer; None where there is none."""
    aims = AIMS.get(row["isa"], {}).get(row["value_dtype"])
    if aims is None or row["threads"] != 1 or row["m"] not in TOKENS:
        return None
    return aims[TOKENS.index(row["m"])]


def missed_aim(row: Row) -> float | None:
    """The same, if the row misses it."""
    aim = aim_of(row)
    return aim if aim is not None and row["ratio"] < aim else None


def ratios(result: Result) -> str:
    """Time of the fastest dense peer, of the dtype of the activations, over sparse time."""
    return by_tokens(["values"], _ratios(result["rows"], result.get("dtype", "bfloat16")))


def ratios_and_aims(result: Result) -> str:
    """The same, also to vLLM's dense int8, with the aims that are missed and their number."""
    rows = result["rows"]
    dense, int8 = (fastest_peer(rows, values) for values in ("bfloat16", "int8"))
    lines = [replace(quantity, missed=missed_aim) for quantity in _ratios(rows)]
    for values in INTEGERS:
        label = f"{values}, to vLLM's dense int8"
        lines.append(Quantity(int8, values, [label], lambda row: row["ratio"]))
    table = by_tokens(["values"], lines)
    aimed = [row for row in dense.values() if aim_of(row) is not None]
    if not aimed:
        return table
    cells = f"{sum(missed_aim(row) is not None for row in aimed)} of {len(aimed)} cells"
    return f"{table}\n\nIn brackets: the project target, where a cell misses it ({cells})."


def _ratios(rows: Rows, dtype: str = "bfloat16") -> list[Quantity]:
    dense = fastest_peer(rows, dtype)
    every = ("bfloat16", *INTEGERS)
    return [Quantity(dense, values, [values], lambda row: row["ratio"]) for values in every]


def bounds(result: Result) -> str:
    """Times as fast as peers in huge pages and as an ideal dense kernel, and share of the floor."""
    return by_tokens(["values", "to"], [*_bounds(result["rows"])])


def _bounds(rows: Rows) -> Iterator[Quantity]:
    def to(time: str) -> Callable[[Row], float]:
        return lambda row: row[time] / row["ours_us"]

    huge = "peer_huge_pages_us"
    for values in ("bfloat16", *INTEGERS):
        dense = fastest_peer(rows, "bfloat16", huge)
        yield Quantity(dense, values, [values, "dense bfloat16 in huge pages"], to(huge))
        if values in INTEGERS:
            int8 = fastest_peer(rows, "int8", huge)
            yield Quantity(int8, values, [values, "vLLM's dense int8 in huge pages"], to(huge))
        dense = fastest_peer(rows, "bfloat16")
        yield Quantity(dense, values, [values, "ideal dense bfloat16"], to("ideal_dense_us"))
        yield Quantity(dense, values, [values, "the floor"], to("stream_floor_us"))


def bandwidth(result: Result) -> str:
    """GB/s at M = 1: the dense bytes over the peer's time, the packed ones over ours."""
    peers = fastest_peer(result["rows"], "bfloat16")
    values = list(dict.fromkeys(values for _, values, _ in peers))
    rows = []
    for shape in dict.fromkeys(shape for shape, _, _ in peers):
        ours = [peers[shape, dtype, 1] for dtype in values]
        dense = 2 * shape[0] * shape[1] / ours[0]["peer_us"]
        read = [dense, *(row["packed_bytes"] / row["ours_us"] for row in ours)]
        bounds = (ours[0]["plain_reading_us"], ours[0]["stream_floor_us"])
        read += [ours[0]["packed_bytes"] / microseconds for microseconds in bounds]
        rows.append([f"{shape[0]} x {shape[1]}", *(f"{rate / 1e3:.1f}" for rate in read)])
    sparse = [f"2:4 {dtype}" for dtype in values]
    return markdown(["N x K", "dense bfloat16", *sparse, "reading alone", "floor"], rows)


def instruction_sets(result: Result) -> str:
    """Dense time over sparse time by instruction set, to PyTorch's bfloat16 and to its float32.

    And to the fastest dense contestant and to vLLM's int8, where the result has them. A result of
    several shapes or patterns has a table's lines for each.
    """
    found = {(_layer(row), row["isa"], row["value_dtype"], row["m"]): row for row in result["rows"]}
    layers = list(dict.fromkeys(layer for layer, *_ in found))
    tokens = list(dict.fromkeys(m for *_, m in found))
    lines: list[tuple[str, str, Callable[[Row], float]]] = [
        ("bfloat16", "bfloat16", lambda row: row["ratio"]),
        ("int8", "int8", lambda row: row["ratio"]),
        ("bfloat16", "bfloat16, to dense float32", lambda r: r["float32_us"] / r["ours_us"]),
    ]
    if all("fastest_ratio" in row for row in found.values()):
        lines += [
            (values, f"{values}, to the fastest dense", lambda row: row["fastest_ratio"])
            for values in ("bfloat16", "int8")
        ]
    if any(row.get("vllm_int8_us") for row in found.values()):
        lines.append(("int8", "int8, to vLLM's dense int8", _to_int8_peer))
    rows = [
        [*([layer] if len(layers) > 1 else []), f"`{isa}`", label]
        + [
            f"{ratio(found[layer, isa, values, m]):.2f}" if (layer, isa, values, m) in found else ""
            for m in tokens
        ]
        for layer in layers
        for isa in dict.fromkeys(isa for _, isa, *_ in found)
        for values, label, ratio in lines
        if any(ratio(row) for key, row in found.items() if key[:3] == (layer, isa, values))
    ]
    header = [*(["N x K"] if len(layers) > 1 else []), "instruction set", "values"]
    return markdown([*header, *(f"M = {m}" for m in tokens)], rows)


def _to_int8_peer(row: Row) -> float:
    """Nothing, where it is no peer."""
    return (row.get("vllm_int8_us") or 0.0) / row["ours_us"]


def _layer(row: Row) -> str:
    return f"{row['n']} x {row['k']}, {row['pattern']}"


def packing(result: Result) -> str:
    """Packing all layers, and the largest of them: a line per value dtype."""
    header = ["values", "seconds", "CPU seconds", "packed, GiB", "largest layer, MiB",
              "its tensors, MiB", "peak, MiB"]  # fmt: skip
    lines = []
    for values in dict.fromkeys(row["value_dtype"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["value_dtype"] == values]
        largest = max(rows, key=lambda row: row["packed_bytes"])
        sums = [sum(row[name] for row in rows) for name in ("seconds", "cpu_seconds")]
        packed = sum(row["packed_bytes"] * row["layers"] for row in rows)
        peak = largest["peak_bytes"]
        of_one = [largest["packed_bytes"], largest["tensor_bytes"], peak]
        lines.append([
            values, *(f"{seconds:.1f}" for seconds in sums), f"{packed / 2**30:.2f}",
            *("" if size is None else f"{size / 2**20:.1f}" for size in of_one),
        ])  # fmt: skip
    return markdown(header, lines)
