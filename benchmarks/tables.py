"""Writes the number tables of the documentation from the results, in place.

    python -m benchmarks.tables            # rewrite README.md and docs/*.md
    python -m benchmarks.tables --check    # say which pages would change, and fail if any

A table stands between `<!-- table: RESULT VIEW -->` and `<!-- end -->`, where RESULT is a file of
`benchmarks/results` and VIEW one of the functions in `VIEWS`. Below it stands what it was measured
on. A value or a row that a result lacks is left out; nothing stands there where a view has no rows.
A view of `SUMMARIES` has several results before its name.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import summaries
from benchmarks.cpu import expert_tables, head_tables, kernel_tables, waiting_tables
from benchmarks.engines import serving_tables, speculation_tables
from benchmarks.pruning import cost_tables
from benchmarks.records.markdown import Result, markdown
from benchmarks.records.rows import STAMP

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- table: (\S+(?: \S+)*) (\S+) -->\n.*?<!-- end -->", re.DOTALL)

FACTS = {
    "windows": "evaluation windows",
    "sequence_length": "tokens in a window",
    "effort": "effort",
    "steps": "learning steps",
    "windows_per_step": "windows in a step",
    "mode": "mode",
    "reserved_cores": "cores reserved",
    "load_average": "load average",
    "small_pages": "rate of small pages to huge ones",
    "threads": "threads",
    "sequences": "sequences",
    "repeats": "repeats",
    "unwatched_ms": "ms a step without the stopwatch",
}
"""Further entries of a result, or of all rows of a table, that are shown with it."""
OF_LEARNING = ("steps", "windows_per_step")
LEARN_NOTHING = ("head",)
"""Studies in which sizes of learning have no effect."""


def measured_on(result: Result) -> str:
    """Date, machine, versions, and whatever else the result says of its making."""
    machine, versions = result["machine"], result["versions"]
    facts = [str(result["date"]), f"{machine['cpu']} (family/model {machine['family']})"]
    facts.append(f"{machine['cores']} cores")
    facts += [f"{name} {versions[name]}" for name in ("torch", "vllm") if name in versions]
    found = ((text, _fact(result, key)) for key, text in FACTS.items())
    facts += [f"{text} {value}" for text, value in found if value]
    if _names_cp(result):
        facts.append("CP inside blocks unless the whole layer is named")
    return ", ".join(facts)


def _names_cp(result: Result) -> bool:
    """Whether a heuristic permutation is in it, which the paper takes through whole layers.

    Our own methods begin with one, learning and the default alike.
    """
    values = [*result.values(), *(v for row in result.get("rows", []) for v in row.values())]
    names = (value for value in values if isinstance(value, str))
    found = any(re.search(r"\bCP\b|\bpermllm-", name, re.IGNORECASE) for name in names)
    return found or "ours" in result


def _fact(result: Result, key: str) -> str:
    """An entry of a result, or the range of a number in the rows; else empty: a column shows it."""
    if key in OF_LEARNING and result.get("study") in LEARN_NOTHING:
        return ""
    rows = [row for row in result.get("rows", []) if "refused" not in row]
    values = [result[key]] if key in result else [row.get(key) for row in rows]
    if not values or any(value is None or isinstance(value, list | Mapping) for value in values):
        return ""
    if len(set(values)) == 1:
        return str(values[0])
    if all(isinstance(value, int | float) for value in values):
        return f"{min(values)}-{max(values)}"
    return ""


# Accuracy


PROCESSOR_SECONDS = "processor_seconds"


def accuracy(result: Result, patterns: Sequence[str]) -> str:
    """Perplexity and its ratio to dense by method and text; the mean over seeds.

    A text that not every seed of a row has been evaluated on is left out of the row.
    """
    kept: dict[tuple[Any, Any, Any], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        if row["pattern"] is None or row["pattern"] in patterns:
            key = row["method"], row["pattern"], row.get("values", "bfloat16")
            kept.setdefault(key, []).append(row)
    domains = list(dict.fromkeys(d for seeds in kept.values() for d in _by_domain(seeds[0])))
    rows = []
    for (method, pattern, values), seeds in kept.items():
        cells = [_method(method, seeds[0].get("servable", True))]
        if values != "bfloat16":
            served = all(row.get("evaluated") == "kernels" for row in seeds)
            cells[0] += f", {values} values, " + ("as served" if served else "weights alone")
        if len(patterns) > 1:
            cells.append(pattern or "")
        cells += [_perplexities(seeds, domain) for domain in domains]
        cells.append("" if len(seeds) == 1 and pattern is None else str(len(seeds)))
        times = [row[PROCESSOR_SECONDS] for row in seeds if row.get(PROCESSOR_SECONDS)]
        rows.append([*cells, f"{mean(times) / 60:.1f}" if times else ""])
    header = ["method", *(["pattern"] if len(patterns) > 1 else []), *domains]
    return markdown([*header, "seeds", "processor minutes"], rows)


def _method(name: str, servable: bool) -> str:
    """Name of a method in a table; one with a heuristic permutation says how far it reaches."""
    if name == "dense":
        return name
    if not servable:
        return f"`{name}` (through the whole layer, no checkpoint)"
    return f"`{name}` (in blocks)" if "+cp" in name else f"`{name}`"


def _perplexities(seeds: Sequence[Mapping[str, Any]], domain: str) -> str:
    if any(domain not in _by_domain(row) for row in seeds):
        return ""
    ratios = [_by_domain(row, "ratio")[domain] for row in seeds]
    spread = f", {min(ratios):.2f}-{max(ratios):.2f}" if len(seeds) > 1 else ""
    value = mean(_by_domain(row)[domain] for row in seeds)
    return f"{value:.1f} ({mean(ratios):.2f}x{spread})"


def _by_domain(row: Mapping[str, Any], key: str = "perplexity") -> Mapping[str, float]:
    """A row of one text alone has a plain number."""
    return row[key] if isinstance(row[key], Mapping) else {"in domain": row[key]}


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
        if field not in STAMP
        and not any(isinstance(row.get(field), list | Mapping) for row in rows)
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


def efforts(result: Result) -> str:
    """Of a result of `benchmarks.efforts`: perplexity (times dense's) by text, and the time."""
    dense = result["rows"][0]["perplexity"]
    lines = []
    for row in result["rows"]:
        texts = row["perplexity"].items()
        cells = [f"{value:.1f} ({value / dense[text]:.2f}x)" for text, value in texts]
        lines.append([row["effort"], *cells, _shown(row.get("processor_minutes"))])
    return markdown(["effort", *dense, "processor minutes"], lines)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
    return "" if value is None else str(value)


VIEWS: Mapping[str, Callable[[Result], str]] = {
    "kernels": kernel_tables.ratios,
    "kernels-and-int8-peer": kernel_tables.ratios_and_aims,
    "bounds": kernel_tables.bounds,
    "bandwidth": kernel_tables.bandwidth,
    "instruction-sets": kernel_tables.instruction_sets,
    "packing": kernel_tables.packing,
    "waiting": waiting_tables.waits,
    "head": head_tables.heads,
    "experts": expert_tables.experts,
    "decode": serving_tables.decode,
    "overview": serving_tables.overview,
    "first-token": serving_tables.first_token,
    "vllm-bench": serving_tables.bench,
    "profile": serving_tables.profile,
    "speculation": speculation_tables.speculation,
    "accuracy-2:4": lambda result: accuracy(result, ["2:4"]),
    "accuracy": lambda result: accuracy(result, ["2:4", "4:8"]),
    "learning-steps": cost_tables.learning_steps,
    "time-to-quality": cost_tables.time_to_quality,
    "pipeline": cost_tables.pipeline,
    "study": study,
    "efforts": efforts,
}

SUMMARIES: Mapping[str, Callable[[summaries.Records, summaries.Link], str]] = {
    "decode-of-all": summaries.decode,
    "peers-of-all": summaries.peers,
    "layers-of-all": summaries.layers,
    "quality": summaries.quality,
}
"""Views of several results."""

ROWS: Mapping[str, Callable[[Result], Sequence[Mapping[str, Any]]]] = {
    "decode": serving_tables.of_engines,
    "overview": serving_tables.of_engines,
    "first-token": serving_tables.of_engines,
    "vllm-bench": serving_tables.of_bench,
}
"""The rows of a view that has not all of its result's."""


def block(names: str, view: str, folder: Path, results: Path = RESULTS) -> str:
    """One table between its markers, with its record; `folder` is that of the page.

    Raises:
        OSError: there is no such result.
        KeyError: there is no such view.
    """
    found = {name: json.loads(_file(name, results).read_text("utf-8")) for name in names.split()}

    def link(name: str, text: str) -> str:
        return f"[{text}]({os.path.relpath(_file(name, results), folder)})"

    if view in SUMMARIES:
        table = SUMMARIES[view](found, link)
        dates = sorted(str(result["date"]) for result in found.values())
        measured = f"measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))}"
        origin = "; ".join(filter(None, (measured, summaries.fragmented(found))))
    else:
        ((name, result),) = found.items()
        table = VIEWS[view](result)
        own = {**result, "rows": ROWS[view](result)} if view in ROWS else result
        origin = f"{link(name, _file(name, results).name)}: {measured_on(own)}"
    shown = f"\n{table}\n\n<sub>{origin}</sub>\n" if table else ""
    return f"<!-- table: {names} {view} -->\n{shown}<!-- end -->"


def _file(name: str, results: Path) -> Path:
    return results / f"{name}.json"


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
