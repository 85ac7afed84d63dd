"""The curve of quality against time is collected from the results of one run per effort."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import efforts
from benchmarks.tables import VIEWS


def result(effort: str, *rows: dict[str, Any]) -> dict[str, Any]:
    dense = {"method": "dense", "pattern": None, "perplexity": {"near": 10.0, "far": 20.0}}
    return {
        "date": f"2030-01-0{len(effort)}",
        "machine": {"cpu": "Some CPU"},
        "versions": {"torch": "9"},
        "model": "tiny",
        "sequence_length": 512,
        "windows": 64,
        "effort": effort,
        "rows": [dense, *rows],
    }


def best(near: float, far: float | None = None, **more: Any) -> dict[str, Any]:
    perplexity = {"near": near} | ({} if far is None else {"far": far})
    row = {"method": "permllm-best", "pattern": "2:4", "seed": 0, "prune_seconds": 600.0}
    return row | {"perplexity": perplexity, **more}


LOW = result("low", best(16, 30, threads=1), best(18, 40, seed=1, prune_seconds=1200.0))
HIGH = result(
    "high",
    best(12),
    best(14, seed=1),
    best(99, seed=2),
    best(99, 99, values="int8"),
    best(99, 99, pattern="4:8"),
)
for row in HIGH["rows"][1:3]:
    row["prune_seconds"] = 6000.0


def test_a_point_is_the_mean_over_the_seeds_that_all_have() -> None:
    found = efforts.curve([HIGH, LOW], "permllm-best", "2:4")
    assert found["rows"] == [
        {"effort": "dense", "perplexity": {"near": 10.0}},
        {"effort": "low", "seeds": 2, "minutes": 15.0, "perplexity": {"near": 17}},
        {"effort": "high", "seeds": 2, "minutes": 100.0, "perplexity": {"near": 13}},
    ]
    assert found["date"] == "2030-01-04"
    assert VIEWS["study"](found).splitlines()[-1] == "| high | 2 | 100 | 13.0 | 1.30 |"


def test_results_are_written_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{one['effort']}.json" for one in (LOW, HIGH)]
    for file, one in zip(files, (LOW, HIGH), strict=True):
        timed = [row | {"processor_seconds": 6.0} if row["pattern"] else row for row in one["rows"]]
        file.write_text(json.dumps(one | {"rows": timed}))
    output, plot = tmp_path / "curve.json", tmp_path / "curve.svg"
    words = [*map(str, files), "--json", str(output), "--plot", str(plot)]
    monkeypatch.setattr(sys, "argv", ["efforts", *words])
    efforts.main()
    assert [row["effort"] for row in json.loads(output.read_text())["rows"]][1:] == ["low", "high"]
    drawn = plot.read_text(encoding="utf-8")
    assert all(word in drawn for word in ("processor minutes", "times dense", "near", "high"))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (HIGH | {"windows": 32}, "windows is 64 and 32"),
        (HIGH | {"machine": {"cpu": "Another"}}, "different CPUs"),
        (HIGH | {"versions": {"torch": "8"}}, "versions is {'torch': '9'} and {'torch': '8'}"),
        (result("high", best(12, threads=2)), "prunes ran on 1 and 2 threads"),
        (result("high"), "effort high has no row of permllm-best at 2:4"),
        (result("high", best(12, seed=2)), "share no seed of permllm-best at 2:4"),
        (
            result("high", best(12, prune_seconds=None)),
            "none of processor_minutes, minutes",
        ),
    ],
)
def test_what_is_not_comparable_is_refused(other: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efforts.curve([LOW, other], "permllm-best", "2:4")
