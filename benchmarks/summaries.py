"""Tables of the documentation that set one record beside the next, a line for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.cpu.conditions import FEWEST
from benchmarks.cpu.kernel_tables import fastest_peer
from benchmarks.records.markdown import Result, markdown

Records = Mapping[str, Result]
"""Results by the names of their files."""
Link = Callable[[str, str], str]
"""The Markdown of a link to a record: its name, and the text."""

MACHINES = {
    "amx": "Intel Xeon, AMX",
    "zen5": "AMD Zen 5",
    "zen4": "AMD Zen 4",
    "zen3": "AMD Zen 3, AVX2",
}
"""The part of a record's name that says what it was measured on: `serving-cpu-zen4-smollm2`."""
VARIANTS = {
    "2:4 bfloat16": "2:4 bfloat16",
    "2:4 int8": "2:4 int8",
    "2:4 int8, int8 head": "and int8 head",
    "2:4 int4": "2:4 int4",
    "vLLM int8 (W8A8)": "vLLM int8 (W8A8)",
    "vLLM int4 (GPTQ)": "vLLM int4 (GPTQ)",
}
"""Columns of decoding."""
RARE = {"2:4 int4"}
"""Of these the ones without a column where no record has them."""
HEADS_OF_INT8 = ("2:4 int8, int8 head",)
BATCHES, PROMPT = (1, 8, 32), 32
FRAGMENTED = "†"
"""Beside the machine of a record that was made in fragmented memory."""


def machine(name: str) -> str:
    """What a record was measured on."""
    return MACHINES[name.split("-")[2]]


def is_fragmented(result: Result) -> bool:
    """Whether small pages were read so slowly that the benchmarks warn; older records lack it."""
    shares = [row.get("small_pages") for row in result["rows"]]
    return any(share is not None and share < FEWEST for share in shares)


def fragmented(records: Records) -> str:
    """What the mark beside a machine means, where a record has it."""
    if not any(map(is_fragmented, records.values())):
        return ""
    return (
        f"{FRAGMENTED} in fragmented memory (small pages below {FEWEST:.0%} of the rate of huge "
        "ones), which flatters ratios to dense"
    )


def _machine(name: str, result: Result) -> str:
    return machine(name) + (f" {FRAGMENTED}" if is_fragmented(result) else "")


def decode(records: Records, link: Link, left_out: Sequence[str] = ()) -> str:
    """Decoding, times as fast as dense bfloat16: 1 / 8 / 32 sequences, as far as measured."""
    measured = {row["variant"] for result in records.values() for row in result["rows"]}
    without = {*left_out, *(RARE - measured)}
    variants = {name: shown for name, shown in VARIANTS.items() if name not in without}
    lines = []
    for name, result in records.items():
        ratios = {
            (row["variant"], row["batch"]): row["decode_ratio"]
            for row in result["rows"]
            if row["prompt_tokens"] == PROMPT and "decode_ratio" in row
        }
        shown = [
            " / ".join(f"{ratios[variant, b]:.1f}x" for b in BATCHES if (variant, b) in ratios)
            for variant in variants
        ]
        shape = result["model"].removeprefix("random-")
        lines.append([link(name, shape), _machine(name, result), *shown])
    return markdown(["shape of", "CPU", *variants.values()], lines)


def peers(records: Records, link: Link) -> str:
    """`decode` without the heads of int8, which vLLM's own variants do not have."""
    return decode(records, link, HEADS_OF_INT8)


def layers(records: Records, link: Link) -> str:
    """One layer, times as fast as the fastest dense bfloat16 peer: the range over all shapes."""
    tokens = sorted({row["m"] for result in records.values() for row in result["rows"]})
    lines = []
    for name, result in records.items():
        kinds = itertools.product(
            dict.fromkeys(row["pattern"] for row in result["rows"]), ("bfloat16", "int8", "int4")
        )
        for pattern, values in kinds:
            key = {"pattern": pattern, "value_dtype": values}
            own = [row for row in result["rows"] if key.items() <= row.items()]
            for peer, label in (("bfloat16", ""), ("int8", ", to vLLM's dense int8")):
                rows = list(fastest_peer(own, peer).values())
                cells = [_range([row["ratio"] for row in rows if row["m"] == m]) for m in tokens]
                if any(cells):
                    cpu = link(name, _machine(name, result))
                    lines.append([cpu, f"{pattern} {values}{label}", *cells])
    return markdown(["CPU", "values", *(f"M = {m}" for m in tokens)], lines)


def _range(values: Sequence[Any]) -> str:
    ends = [f"{value:.1f}" for value in (min(values), max(values))] if values else []
    return " to ".join(dict.fromkeys(ends))
