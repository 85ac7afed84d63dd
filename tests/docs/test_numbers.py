"""What the number tables of the pages show of a result."""

import json
from pathlib import Path
from typing import Any

from benchmarks import tables

MACHINE = {"cpu": "Some CPU", "family": "1/2", "cores": 3}
RECORD = {"date": "2030-01-02", "machine": MACHINE, "versions": {"torch": "9.8", "python": "4"}}


def kernel_row(k: int, values: str, m: int, peer: str, peer_us: float) -> dict[str, Any]:
    """A row of `benchmarks.kernels`, of a layer with 1000 outputs that takes 2 us."""
    return {
        "n": 1000,
        "k": k,
        "m": m,
        "pattern": "2:4",
        "value_dtype": values,
        "isa": "avx512_bf16",
        "threads": 2,
        "peer": peer,
        "peer_values": "int8" if peer == "vllm int8" else "bfloat16",
        "peer_us": peer_us,
        "ours_us": 2.0,
        "ratio": peer_us / 2,
    }


KERNELS = {
    "rows": [
        kernel_row(8, "bfloat16", 1, "torch", 8.0),
        kernel_row(8, "bfloat16", 1, "vllm", 5.0),
        kernel_row(8, "int8", 1, "vllm", 5.0),
        kernel_row(8, "int8", 1, "torch", 8.0),
        kernel_row(8, "int8", 1, "vllm int8", 2.5),
        kernel_row(8, "bfloat16", 16, "torch", 2.01),
        kernel_row(8, "bfloat16", 16, "vllm", 4.0),
    ]
}
RATIOS = """\
| N x K | values | M = 1 | M = 16 |
|---|---|---|---|
| 1000 x 8 | bfloat16 | 2.50 | 1.00 |
| 1000 x 8 | int8 | 2.50 |  |
| 1000 x 8 | int8, to vLLM's dense int8 | 1.25 |  |"""


def test_kernels_are_held_against_the_fastest_dense_peer() -> None:
    assert tables.VIEWS["kernels"](KERNELS) == RATIOS


def test_patterns_have_lines_of_their_own() -> None:
    rows = [row for row in KERNELS["rows"] if row["value_dtype"] == "bfloat16"]
    other = [kernel_row(8, "bfloat16", 4, "vllm", 3.0) | {"pattern": "4:8"}]
    assert tables.VIEWS["kernels"]({"rows": rows + other}).splitlines() == [
        "| N x K | values | M = 1 | M = 4 | M = 16 |",
        "|---|---|---|---|---|",
        "| 1000 x 8, 2:4 | bfloat16 | 2.50 |  | 1.00 |",
        "| 1000 x 8, 4:8 | bfloat16 |  | 1.50 |  |",
    ]
    alone = tables.VIEWS["kernels"]({"rows": other})
    assert alone.splitlines()[2:] == ["| 1000 x 8 | bfloat16 | 1.50 |"]


def test_what_differs_between_rows_is_shown_as_a_range() -> None:
    rows = [{"load_average": 0.5, "threads": 2}, {"load_average": 1.2, "threads": 2}]
    shown = tables.measured_on(RECORD | {"rows": rows, "mode": "eager"})
    assert shown.endswith("torch 9.8, mode eager, load average 0.5-1.2, threads 2")
    shown = tables.measured_on(RECORD | {"rows": [*rows, {"load_average": None}], "mode": None})
    assert shown.endswith("torch 9.8")


def test_what_was_refused_says_nothing_of_a_table(
    tmp_path: Path,
) -> None:
    decode = {"variant": "dense", "batch": 1, "prompt_tokens": 32}
    measured = {"decode_tokens_per_second": 1.0, "threads": 2, "repeats": 5, "load_average": 0.5}
    rows = [
        {**decode, **measured},
        {**decode, "variant": "int4", "refused": "because"},
    ]
    (tmp_path / "new.json").write_text(json.dumps(RECORD | {"rows": rows}))
    shown = tables.block("new", "decode", tmp_path, tmp_path)
    assert "torch 9.8, load average 0.5, threads 2, repeats 5</sub>" in shown


def test_an_overview_has_the_cells_that_are_asked_for_first() -> None:
    def row(variant: str, batch: int, prompt: int, **more: Any) -> dict[str, Any]:
        return {"variant": variant, "batch": batch, "prompt_tokens": prompt, **more}

    def speed(tokens: float, ratio: float) -> dict[str, float]:
        found = {"decode_tokens_per_second": tokens, "decode_ratio": ratio}
        return found | {"time_to_first_token_ms": 1000 / ratio, "first_token_ratio": ratio}

    rows = [
        row("dense", 1, 32, **speed(5, 1), resident_mib=4000.0, resident_ratio=1.0),
        row("dense", 1, 512, **speed(4, 1)),
        row("2:4", 1, 32, **speed(10, 2), resident_mib=2500.4, resident_ratio=0.625),
        row("2:4", 8, 32, **speed(40, 1.5)),
        row("2:4", 1, 512, **speed(9, 1.25)),
        row("int4", 1, 32, refused="because"),
    ]
    assert tables.VIEWS["overview"]({"rows": rows}).splitlines() == [
        "| variant | 1 sequence, tokens/s | 8 sequences | 32 sequences "
        "| first token of a prompt of 512 | resident MiB |",
        "|---|---|---|---|---|---|",
        "| dense | 5.0 (1.00x) |  |  | 1000 ms (1.00x) | 4000 (1.00x) |",
        "| 2:4 | 10.0 (2.00x) | 40.0 (1.50x) |  | 800 ms (1.25x) | 2500 (0.62x) |",
        "| int4 | refused |  |  |  |  |",
    ]


def test_a_page_is_rewritten_between_its_markers(tmp_path: Path) -> None:
    record = RECORD | {"load_average": 0.5} | KERNELS
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "new.json").write_text(json.dumps(record))
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    empty = "before | 1.23 |\n<!-- table: new kernels -->\n{}<!-- end -->\nafter\n"
    page.write_text(empty.format("| 9.99 |\n"))
    origin = (
        "<sub>[new.json](../results/new.json): 2030-01-02, Some CPU (family/model 1/2), 3 cores, "
        "torch 9.8, load average 0.5, threads 2</sub>"
    )
    expected = empty.format(f"\n{RATIOS}\n\n{origin}\n")
    assert tables.updated(page, tmp_path / "results") == expected
    page.write_text(expected)
    assert tables.updated(page, tmp_path / "results") == expected
