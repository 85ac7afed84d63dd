"""A serving result is drawn in four panels, whatever it lacks."""

import json
from pathlib import Path
from typing import Any

from benchmarks import figures


def row(variant: str, batch: int, **found: Any) -> dict[str, Any]:
    return {"variant": variant, "batch": batch, "prompt_tokens": 32, **found}


def measured(variant: str, batch: int, **more: float) -> dict[str, Any]:
    times = {"decode_tokens_per_second": 9.0, "time_to_first_token_ms": 80.0}
    held = {"load_seconds": 20.0, "resident_mib": 300.0}
    return row(variant, batch, **times, **held, **more)


def drawn(folder: Path, rows: list[dict[str, Any]]) -> str:
    record = {"model": "m", "machine": {"cpu": "A chip"}, "mode": "eager", "rows": rows}
    (folder / "serving-x.json").write_text(json.dumps(record))
    (file,) = figures.draw(["serving-x"], folder, folder)
    assert file.name == "serving-x.svg"
    return file.read_text()


def test_ratios_to_dense_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    ratios = {"decode_ratio": 2.0, "first_token_ratio": 1.5}
    rows = [measured("dense", 1), measured("2:4", 1, **ratios), measured("2:4", 8, **ratios)]
    rows += [row("int4", 8, refused="because")]
    plot = drawn(tmp_path, rows)
    for text in (
        "m on A chip, eager", "decode tokens/s, times dense", "load, s", "resident memory, MiB",
        "first token, times as early as dense's", ">batch 1<", ">batch 8<", ">2:4<",
    ):  # fmt: skip
        assert text in plot
    assert "int4" not in plot
    assert drawn(tmp_path, rows) == plot


def test_times_are_drawn_where_dense_was_not_served(tmp_path: Path) -> None:
    plot = drawn(tmp_path, [measured("2:4", 1)])
    assert ">decode tokens/s<" in plot
    assert ">first token, ms<" in plot


def test_a_result_of_refusals_alone_has_empty_panels(tmp_path: Path) -> None:
    assert "m on A chip, eager" in drawn(tmp_path, [row("2:4", 1, refused="because")])
