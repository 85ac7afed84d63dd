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
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import quality, summaries
from benchmarks.cpu import kernel_tables
from benchmarks.engines import serving_tables, speculation_tables
from benchmarks.records.markdown import Result

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"<!-- table: (\S+(?: \S+)*) (\S+) -->\n.*?<!-- end -->", re.DOTALL)

FACTS = {
    "windows": "evaluation windows",
    "sequence_length": "tokens in a window",
    "effort": "effort",
    "mode": "mode",
    "reserved_cores": "cores reserved",
    "load_average": "load average",
    "small_pages": "rate of small pages to huge ones",
    "threads": "threads",
    "repeats": "repeats",
}
"""Further entries of a result, or of all rows of a table, that are shown with it."""


def measured_on(result: Result) -> str:
    """Date, machine, versions, and whatever else the result says of its making."""
    machine, versions = result["machine"], result["versions"]
    facts = [str(result["date"]), f"{machine['cpu']} (family/model {machine['family']})"]
    facts.append(f"{machine['cores']} cores")
    facts += [f"{name} {versions[name]}" for name in ("torch", "vllm") if name in versions]
    found = ((text, _fact(result, key)) for key, text in FACTS.items())
    facts += [f"{text} {value}" for text, value in found if value]
    return ", ".join(facts)


def _fact(result: Result, key: str) -> str:
    """An entry of a result, or the range of a number in the rows; else empty: a column shows it."""
    rows = [row for row in result.get("rows", []) if "refused" not in row]
    values = [result[key]] if key in result else [row.get(key) for row in rows]
    if not values or any(value is None or isinstance(value, list | Mapping) for value in values):
        return ""
    if len(set(values)) == 1:
        return str(values[0])
    if all(isinstance(value, int | float) for value in values):
        return f"{min(values)}-{max(values)}"
    return ""


VIEWS: Mapping[str, Callable[[Result], str]] = {
    "kernels": kernel_tables.ratios,
    "patterns": kernel_tables.patterns,
    "decode": serving_tables.decode,
    "overview": serving_tables.overview,
    "speculation": speculation_tables.speculation,
    "methods": quality.methods,
}

SUMMARIES: Mapping[str, Callable[[summaries.Records, summaries.Link], str]] = {
    "decode-of-all": summaries.decode,
    "peers-of-all": summaries.peers,
    "layers-of-all": summaries.layers,
    "quality": quality.default_method,
}
"""Views of several results."""


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
        origin = f"{link(name, _file(name, results).name)}: {measured_on(result)}"
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
