"""Quality against time of a method that distils, from a result of `benchmarks.accuracy` per effort.

    python -m benchmarks.efforts LOW.json DEFAULT.json HIGH.json --json OUT [--plot OUT.svg]

Nothing is measured: the rows of one method and pattern are collected, as the mean of the seeds that
every result has, since a seed decides the text. The table of OUT is that of a study
(`<!-- table: OUT study -->`).
"""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from .records.drawing import Row, save

SHARED = ("model", "sequence_length", "windows")
SAME = (*SHARED, "versions")
TIMES = {"processor_minutes": "processor_seconds", "minutes": "prune_seconds"}
"""Field -> that of the results, in the order in which a plot prefers them."""


def curve(results: Sequence[Mapping[str, Any]], method: str, pattern: str) -> dict[str, Any]:
    """The result that shows one point for each effort, the dense model in front.

    Raises:
        ValueError: results that differ in more than the effort, that lack the method or a time, or
            that share no seed.
    """
    first = results[0]
    for other in results:
        for name in SAME:
            if other[name] != first[name]:
                raise ValueError(
                    f"{name} is {first[name]!r} and {other[name]!r}: points of one curve must be "
                    "comparable; give results with the same settings"
                )
        if other["machine"]["cpu"] != first["machine"]["cpu"]:
            raise ValueError("the results are of different CPUs, so their times say nothing")
    threads = {
        row["threads"]
        for result in results
        for row in _rows(result, method, pattern)
        if row.get("threads") is not None
    }
    if len(threads) > 1:
        raise ValueError(
            f"the prunes ran on {' and '.join(map(str, sorted(threads)))} threads: their times are "
            "not comparable; give results of one number of threads"
        )
    seeds = _shared_seeds(results, method, pattern)
    points = [_point(result, method, pattern, seeds) for result in results]
    shared = [time for time in TIMES if all(time in row for row in points)]
    if not shared:
        raise ValueError(
            f"the results have none of {', '.join(TIMES)} in common: measure them again"
        )
    points.sort(key=lambda row: row[shared[0]])
    dense = next(row for row in first["rows"] if row["method"] == "dense")
    rows = [{"effort": "dense", "perplexity": dense["perplexity"]}, *points]
    texts = [text for text in dense["perplexity"] if all(text in r["perplexity"] for r in rows)]
    for row in rows:
        row["perplexity"] = {text: row["perplexity"][text] for text in texts}
    kept = {name: first[name] for name in ("machine", "versions", *SHARED)}
    date = max(result["date"] for result in results)
    return {"date": date, **kept, "method": method, "pattern": pattern, "rows": rows}


def _rows(result: Mapping[str, Any], method: str, pattern: str) -> list[Mapping[str, Any]]:
    key = method, pattern, "bfloat16"
    return [
        row
        for row in result["rows"]
        if (row["method"], row["pattern"], row.get("values", "bfloat16")) == key
    ]


def _shared_seeds(results: Sequence[Mapping[str, Any]], method: str, pattern: str) -> set[int]:
    """The seeds that every result has."""
    seeds = [{row["seed"] for row in _rows(result, method, pattern)} for result in results]
    for result, found in zip(results, seeds, strict=True):
        if not found:
            effort = result["effort"]
            raise ValueError(f"the result of effort {effort} has no row of {method} at {pattern}")
    shared = set.intersection(*seeds)
    if not shared:
        raise ValueError(f"the results share no seed of {method} at {pattern}: measure one in all")
    return shared


def _point(
    result: Mapping[str, Any], method: str, pattern: str, seeds: Collection[int]
) -> dict[str, Any]:
    rows = [row for row in _rows(result, method, pattern) if row["seed"] in seeds]
    times = {
        field: round(mean(row[name] for row in rows) / 60, 1)
        for field, name in TIMES.items()
        if all(row.get(name) for row in rows)
    }
    texts = [text for text in rows[0]["perplexity"] if all(text in r["perplexity"] for r in rows)]
    found = {text: mean(row["perplexity"][text] for row in rows) for text in texts}
    return {"effort": result["effort"], "seeds": len(rows), **times, "perplexity": found}


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Ratio to the dense model over time, a line for each text."""
    dense, *points = rows
    time = next(field for field in TIMES if all(field in row for row in points))
    minutes = [row[time] for row in points]
    for text, best in dense["perplexity"].items():
        axes.plot(minutes, [row["perplexity"][text] / best for row in points], "o-", label=text)
    places = [f"{row['effort']}\n{value:.0f}" for row, value in zip(points, minutes, strict=True)]
    axes.set(xscale="log", xlabel=time.replace("_", " "), ylabel="perplexity, times dense")
    axes.set_xticks(minutes, places)
    axes.minorticks_off()
    axes.set_ylim(bottom=1)
    axes.grid(alpha=0.3)
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path, help="of benchmarks.accuracy, one each")
    parser.add_argument("--method", default="permllm-best")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--json", type=Path, required=True, help="where the curve is written")
    parser.add_argument("--plot", type=Path, help="where the SVG is written")
    options = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in options.results]
    try:
        result = curve(found, options.method, options.pattern)
    except ValueError as error:
        parser.error(str(error))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if options.plot is not None:
        save(draw, result["rows"], options.plot)


if __name__ == "__main__":
    main()
