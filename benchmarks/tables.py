"""Writes the number tables of the documentation from the results, in place.

    python -m benchmarks.tables            # rewrite README.md and docs/*.md
    python -m benchmarks.tables --check    # say which pages would change, and fail if any

A table stands between `<!-- table: RESULT VIEW -->` and `<!-- end -->`, where RESULT is a file of
`benchmarks/results` and VIEW one of the functions in `VIEWS`. Below it stands what it was measured
on. A value or a row that a result lacks is left out.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- table: (\S+) (\S+) -->\n.*?<!-- end -->", re.DOTALL)

FACTS = {
    "windows": "evaluation windows",
    "sequence_length": "tokens in a window",
    "effort": "effort",
    "steps": "learning steps",
    "windows_per_step": "windows in a step",
    "load_average": "load average",
    "threads": "threads",
}
"""Further entries of a result that are shown with its tables."""

Result = Mapping[str, Any]
Rows = Iterable[Mapping[str, Any]]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; its last line has no newline."""
    lines = [f"| {' | '.join(cells)} |" for cells in [header, *rows]]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def measured_on(result: Result) -> str:
    """Date, machine, versions, and whatever else the result says of its making."""
    machine, versions = result["machine"], result["versions"]
    facts = [str(result["date"]), f"{machine['cpu']} (family/model {machine['family']})"]
    facts.append(f"{machine['cores']} cores")
    facts += [f"{name} {versions[name]}" for name in ("torch", "vllm") if name in versions]
    facts += [f"{text} {result[key]}" for key, text in FACTS.items() if _is_plain(result.get(key))]
    return ", ".join(facts)


def _is_plain(value: Any) -> bool:
    return value is not None and not isinstance(value, list | Mapping)


# Kernels


def fastest_peer(rows: Rows, peer_values: str = "bfloat16") -> dict[tuple[Any, ...], Any]:
    """The row of the fastest peer, by (n, k), value dtype and m; of 2:4 alone."""
    found: dict[tuple[Any, ...], Any] = {}
    for row in rows:
        key = (row["n"], row["k"]), row["value_dtype"], row["m"]
        if row["pattern"] != "2:4" or row["peer_values"] != peer_values:
            continue
        if key not in found or row["peer_us"] < found[key]["peer_us"]:
            found[key] = row
    return found


def kernel_ratios(result: Result, *, int8_peer: bool) -> str:
    """Dense time over sparse time: a line per shape and value dtype, a column per token count."""
    peers = fastest_peer(result["rows"])
    lines = [(peers, values, values) for values in ("bfloat16", "int8")]
    if int8_peer:
        to_int8 = fastest_peer(result["rows"], "int8")
        lines.append((to_int8, "int8", "int8, to vLLM's dense int8"))
    tokens = list(dict.fromkeys(m for _, _, m in peers))
    rows = [
        [f"{shape[0]} x {shape[1]}", label]
        + [_number(found.get((shape, values, m)), "ratio", 2) for m in tokens]
        for shape in dict.fromkeys(shape for shape, _, _ in peers)
        for found, values, label in lines
        if any((shape, values, m) in found for m in tokens)
    ]
    return markdown(["N x K", "values", *(f"M = {m}" for m in tokens)], rows)


def kernel_bandwidth(result: Result) -> str:
    """GB/s at M = 1: the dense bytes over the peer's time, the packed ones over ours."""
    peers = fastest_peer(result["rows"])
    rows = []
    for shape in dict.fromkeys(shape for shape, _, _ in peers):
        ours = [peers[shape, values, 1] for values in ("bfloat16", "int8")]
        dense = 2 * shape[0] * shape[1] / ours[0]["peer_us"]
        read = [dense, *(row["packed_bytes"] / row["ours_us"] for row in ours)]
        read.append(ours[0]["packed_bytes"] / ours[0]["stream_floor_us"])
        rows.append([f"{shape[0]} x {shape[1]}", *(f"{rate / 1e3:.1f}" for rate in read)])
    header = ["N x K", "dense bfloat16", "2:4 bfloat16", "2:4 int8", "plain reading"]
    return markdown(header, rows)


def instruction_set_ratios(result: Result) -> str:
    """Dense time over sparse time by instruction set, to dense bfloat16 and to dense float32."""
    found = {(row["isa"], row["value_dtype"], row["m"]): row for row in result["rows"]}
    tokens = list(dict.fromkeys(m for _, _, m in found))
    lines: list[tuple[str, str, Callable[[Mapping[str, Any]], float]]] = [
        ("bfloat16", "bfloat16", lambda row: row["ratio"]),
        ("int8", "int8", lambda row: row["ratio"]),
        ("bfloat16", "bfloat16, to dense float32", lambda r: r["float32_us"] / r["ours_us"]),
    ]
    rows = [
        [f"`{isa}`", label]
        + [
            f"{ratio(found[isa, values, m]):.2f}" if (isa, values, m) in found else ""
            for m in tokens
        ]
        for isa in dict.fromkeys(isa for isa, _, _ in found)
        for values, label, ratio in lines
    ]
    return markdown(["instruction set", "values", *(f"M = {m}" for m in tokens)], rows)


# Serving


def serving(result: Result, value: Callable[[Mapping[str, Any]], str], *, memory: bool) -> str:
    """A line per variant, a column per batch and prompt length.

    `memory` adds the most that the engine's processes had to themselves.
    """
    found = {(row["variant"], row["batch"], row["prompt_tokens"]): row for row in result["rows"]}
    cells = list(dict.fromkeys((batch, prompt) for _, batch, prompt in found))
    resident: dict[str, float] = {}
    for (variant, *_), row in found.items():
        if memory and "resident_mib" in row:
            resident[variant] = max(row["resident_mib"], resident.get(variant, 0.0))
    lines = []
    for variant in dict.fromkeys(variant for variant, _, _ in found):
        rows = [found.get((variant, *cell)) for cell in cells]
        line = [variant, *("" if row is None else value(row) for row in rows)]
        if resident:
            line.append(f"{resident[variant]:.0f}" if variant in resident else "")
        lines.append(line)
    header = ["variant", *(f"batch {batch}, prompt {prompt}" for batch, prompt in cells)]
    return markdown([*header, *(["resident MiB"] if resident else [])], lines)


def decode_speed(row: Mapping[str, Any]) -> str:
    """Decoded tokens per second, and how many times dense's that is."""
    return f"{row['decode_tokens_per_second']:.1f} ({row['decode_ratio']:.2f}x)"


def first_token_speed(row: Mapping[str, Any]) -> str:
    """How many times as early as dense's the first token comes."""
    return f"{row['first_token_ratio']:.2f}x"


def profile(result: Result) -> str:
    """Milliseconds of one decoded token by part."""
    total = sum(row["milliseconds"] for row in result["rows"])
    rows = [
        [row["part"], f"{row['milliseconds']:.1f}", f"{row['milliseconds'] / total:.0%}"]
        for row in result["rows"]
    ]
    return markdown(["part", "ms", "share"], [*rows, ["together", f"{total:.1f}", "100%"]])


# Accuracy


ACCURACY_TIMES = {"prune_seconds": "minutes", "processor_seconds": "processor minutes"}


def accuracy(result: Result, patterns: Sequence[str]) -> str:
    """Perplexity and its ratio to dense by method and text; the mean over seeds."""
    kept: dict[tuple[Any, Any, Any], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if row["pattern"] is None or row["pattern"] in patterns:
            key = row["method"], row["pattern"], row.get("values", "bfloat16")
            kept.setdefault(key, []).append(row)
    domains = list(dict.fromkeys(d for rows in kept.values() for d in _by_domain(rows[0])))
    times = {
        key: name
        for key, name in ACCURACY_TIMES.items()
        if any(row.get(key) for seeds in kept.values() for row in seeds)
    }
    rows = []
    for (method, pattern, values), seeds in kept.items():
        cells = [method if method == "dense" else f"`{method}`"]
        if values == "int8":
            cells[0] += ", int8 values"
        if not seeds[0].get("servable", True):
            cells[0] += " (no checkpoint)"
        if len(patterns) > 1:
            cells.append(pattern or "")
        for domain in domains:
            cells.append(f"{mean(_by_domain(row)[domain] for row in seeds):.1f}")
            ratios = [_by_domain(row, "ratio")[domain] for row in seeds]
            spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if len(seeds) > 1 else ""
            cells.append(f"{mean(ratios):.2f}{spread}")
        minutes = [mean(row.get(key, 0.0) for row in seeds) / 60 for key in times]
        rows.append([*cells, *(f"{value:.1f}" if value else "" for value in minutes)])
    header = ["method", *(["pattern"] if len(patterns) > 1 else [])]
    for domain in domains:
        header += [f"perplexity, {domain}", "x dense"]
    return markdown([*header, *times.values()], rows)


def _by_domain(row: Mapping[str, Any], key: str = "perplexity") -> Mapping[str, float]:
    """A row of one text alone has a plain number."""
    return row[key] if isinstance(row[key], Mapping) else {"in domain": row[key]}


# What learning costs


def learning_steps(result: Result) -> str:
    """Seconds and memory of a learning step of one layer: the paper's dense loop, and ours."""
    by_width: dict[int, dict[str, Mapping[str, Any]]] = {}
    for step in result["steps"]:
        by_width.setdefault(step["width"], {})[step["loop"]] = step
    rows = []
    for width, loops in by_width.items():
        dense, ours = loops["dense"], loops["ours"]
        ratio = dense["seconds"] / ours["seconds"]
        rows.append([f"{width}", f"{dense['seconds']:.3f}", f"{ours['seconds']:.3f}"])
        rows[-1] += [f"{ratio:.1f}x", f"{dense['peak_mib']:.0f}", f"{ours['peak_mib']:.0f}"]
    header = ["channels", "dense loop, s", "ours, s", "times as fast"]
    return markdown([*header, "dense loop, MiB", "ours, MiB"], rows)


def time_to_quality(result: Result) -> str:
    """Seconds and perplexities of the dense loop, and of ours with more and more steps."""
    baseline = result["baseline"]
    rows = []
    for run in (baseline, *result["ours"]):
        row = ["the paper's dense loop" if run is baseline else "ours", str(run["steps"])]
        row += [f"{run['seconds']:.0f}", f"{run['seconds'] / baseline['seconds']:.2f}"]
        rows.append([*row, *(f"{value:.1f}" for value in run["perplexity"].values())])
    domains = [f"perplexity, {domain}" for domain in baseline["perplexity"]]
    return markdown(["loop", "steps", "seconds", "share of time", *domains], rows)


# Studies


def study(result: Result) -> str:
    """A line per cell, a column per field that holds text or a number; perplexity by text.

    Cells that were refused are left out: the page says why.
    """
    rows = [row for row in result["rows"] if "refused" not in row]
    domains = list(rows[0]["perplexity"])
    dense = rows[0]["perplexity"]
    fields = [
        field
        for field in dict.fromkeys(field for row in rows for field in row)
        if not any(isinstance(row.get(field), list | Mapping) for row in rows)
    ]
    lines = []
    for row in rows:
        line = [_shown(row.get(field)) for field in fields]
        for domain in domains:
            value = row["perplexity"][domain]
            line += [f"{value:.1f}", f"{value / dense[domain]:.2f}"]
        lines.append(line)
    header = ["processor seconds" if f == "seconds" else f.replace("_", " ") for f in fields]
    for domain in domains:
        header += [f"perplexity, {domain}", "x dense"]
    return markdown(header, lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
    return "" if value is None else str(value)


def _number(row: Mapping[str, Any] | None, key: str, digits: int) -> str:
    return "" if row is None or key not in row else f"{row[key]:.{digits}f}"


VIEWS: Mapping[str, Callable[[Result], str]] = {
    "kernels": lambda result: kernel_ratios(result, int8_peer=False),
    "kernels-and-int8-peer": lambda result: kernel_ratios(result, int8_peer=True),
    "bandwidth": kernel_bandwidth,
    "instruction-sets": instruction_set_ratios,
    "decode": lambda result: serving(result, decode_speed, memory=True),
    "first-token": lambda result: serving(result, first_token_speed, memory=False),
    "profile": profile,
    "accuracy-2:4": lambda result: accuracy(result, ["2:4"]),
    "accuracy": lambda result: accuracy(result, ["2:4", "4:8"]),
    "learning-steps": learning_steps,
    "time-to-quality": time_to_quality,
    "study": study,
}


def block(name: str, view: str, folder: Path, results: Path = RESULTS) -> str:
    """One table between its markers, with its record; `folder` is that of the page.

    Raises:
        OSError: there is no such result.
        KeyError: there is no such view.
    """
    file = results / f"{name}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    link = f"[{file.name}]({os.path.relpath(file, folder)})"
    origin = f"<sub>{link}: {measured_on(result)}</sub>"
    return f"<!-- table: {name} {view} -->\n\n{VIEWS[view](result)}\n\n{origin}\n<!-- end -->"


def updated(page: Path, results: Path = RESULTS) -> str:
    """The text of a page with every table written anew."""
    text = page.read_text(encoding="utf-8")
    return BLOCK.sub(lambda found: block(found[1], found[2], page.parent, results), text)


def pages() -> list[Path]:
    """Pages that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    changed = 0
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = updated(page)
        if new != old:
            changed += 1
            print(f"{page.relative_to(ROOT)}: {'differs from the results' if check else 'updated'}")
            if not check:
                page.write_text(new, encoding="utf-8")
    sys.exit(1 if check and changed else 0)


if __name__ == "__main__":
    main()
