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
        "threads": 2,  # of which no aim is known
        "peer": peer,
        "peer_values": "int8" if peer == "vllm int8" else "bfloat16",
        "peer_us": peer_us,
        "ours_us": 2.0,
        "ratio": peer_us / 2,
        "packed_bytes": 9000 if values == "bfloat16" else 5000,
        "peer_huge_pages_us": None,
        "plain_reading_us": 2.25,
        "stream_floor_us": 1.8 if values == "bfloat16" else 1.0,
        "ideal_dense_us": 3.2,
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
| 1000 x 8 | int8 | 2.50 |  |"""


def test_kernels_are_held_against_the_fastest_dense_peer() -> None:
    assert tables.VIEWS["kernels"](KERNELS) == RATIOS
    longer = RATIOS + "\n| 1000 x 8 | int8, to vLLM's dense int8 | 1.25 |  |"
    assert tables.VIEWS["kernels-and-int8-peer"](KERNELS) == longer


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


def test_bounds_are_those_of_the_fastest_peer_of_each_kind() -> None:
    huge = {("bfloat16", "torch"): 4.0, ("bfloat16", "vllm"): 4.5, ("int8", "vllm int8"): 2.2}
    rows = [
        row | {"peer_huge_pages_us": huge.get((row["value_dtype"], row["peer"]))}
        for row in KERNELS["rows"]
        if row["m"] == 1
    ]
    assert tables.VIEWS["bounds"]({"rows": rows}).splitlines() == [
        "| N x K | values | to | M = 1 |",
        "|---|---|---|---|",
        "| 1000 x 8 | bfloat16 | dense bfloat16 in huge pages | 2.00 |",
        "| 1000 x 8 | bfloat16 | ideal dense bfloat16 | 1.60 |",
        "| 1000 x 8 | bfloat16 | the floor | 0.90 |",
        "| 1000 x 8 | int8 | vLLM's dense int8 in huge pages | 1.10 |",
        "| 1000 x 8 | int8 | ideal dense bfloat16 | 1.60 |",
        "| 1000 x 8 | int8 | the floor | 0.50 |",
    ]


def test_bandwidth_is_bytes_over_time() -> None:
    # 16 000 bytes in 5 us; 9000 and 5000 in 2; 9000 in 2.25 and in 1.8
    found = tables.VIEWS["bandwidth"](KERNELS).splitlines()[2]
    assert found == "| 1000 x 8 | 3.2 | 4.5 | 2.5 | 4.0 | 5.0 |"


def test_what_differs_between_rows_is_shown_as_a_range() -> None:
    rows = [{"load_average": 0.5, "threads": 2}, {"load_average": 1.2, "threads": 2}]
    shown = tables.measured_on(RECORD | {"rows": rows, "mode": "eager"})
    assert shown.endswith("torch 9.8, mode eager, load average 0.5-1.2, threads 2")
    shown = tables.measured_on(RECORD | {"rows": [*rows, {"load_average": None}], "mode": None})
    assert shown.endswith("torch 9.8")


def test_what_was_refused_and_the_rows_of_other_tables_say_nothing_of_a_table(
    tmp_path: Path,
) -> None:
    decode = {"benchmark": "decode", "variant": "dense", "batch": 1, "prompt_tokens": 32}
    measured = {"decode_tokens_per_second": 1.0, "threads": 2, "repeats": 5, "load_average": 0.5}
    rows = [
        {**decode, **measured},
        {**decode, "variant": "int4", "refused": "because"},
        {**decode, "benchmark": "latency", "seconds": 2.5, "load_average": 1.5},
    ]
    (tmp_path / "new.json").write_text(json.dumps(RECORD | {"rows": rows}))
    shown = tables.block("new", "decode", tmp_path, tmp_path)
    assert "torch 9.8, load average 0.5, threads 2, repeats 5</sub>" in shown
    shown = tables.block("new", "vllm-bench", tmp_path, tmp_path)
    assert "torch 9.8, load average 1.5</sub>" in shown


def test_a_study_that_learns_nothing_shows_no_steps() -> None:
    study = RECORD | {"rows": [], "steps": 1, "windows_per_step": 2, "windows": 64}
    assert tables.measured_on(study | {"study": "head"}).endswith("evaluation windows 64")
    learned = tables.measured_on(study | {"study": "blocks"})
    assert learned.endswith("learning steps 1, windows in a step 2")


def test_instruction_sets_have_two_peers() -> None:
    row: dict[str, Any] = {"n": 64, "k": 8, "pattern": "2:4", "isa": "avx2", "m": 4}
    row |= {"float32_us": 9.0, "ours_us": 2.0}
    rows = [
        row | {"value_dtype": "bfloat16", "ratio": 3.0},
        row | {"value_dtype": "int8", "ratio": 4},
    ]
    assert tables.VIEWS["instruction-sets"]({"rows": rows}).splitlines()[2:] == [
        "| `avx2` | bfloat16 | 3.00 |",
        "| `avx2` | int8 | 4.00 |",
        "| `avx2` | bfloat16, to dense float32 | 4.50 |",
    ]
    newer = [row | {"fastest_ratio": 2.5 - number} for number, row in enumerate(rows)]
    assert tables.VIEWS["instruction-sets"]({"rows": newer}).splitlines()[4:] == [
        "| `avx2` | bfloat16, to dense float32 | 4.50 |",
        "| `avx2` | bfloat16, to the fastest dense | 2.50 |",
        "| `avx2` | int8, to the fastest dense | 1.50 |",
    ]
    integers = [row | {"vllm_int8_us": 3.0} for row in newer]
    assert tables.VIEWS["instruction-sets"]({"rows": integers}).splitlines()[7:] == [
        "| `avx2` | int8, to vLLM's dense int8 | 1.50 |",
    ]
    alone = tables.VIEWS["instruction-sets"]({"rows": integers[1:]}).splitlines()[2:]
    assert [line.split(" | ")[1] for line in alone] == [
        "int8", "int8, to the fastest dense", "int8, to vLLM's dense int8"
    ]  # fmt: skip
    other = rows + [row | {"pattern": "4:8", "ratio": 5} for row in rows]
    assert tables.VIEWS["instruction-sets"]({"rows": other}).splitlines()[4:7] == [
        "| 64 x 8, 2:4 | `avx2` | bfloat16, to dense float32 | 4.50 |",
        "| 64 x 8, 4:8 | `avx2` | bfloat16 | 5.00 |",
        "| 64 x 8, 4:8 | `avx2` | int8 | 5.00 |",
    ]


def accuracy_row(method: str, pattern: str | None, domain: float, novels: float) -> dict[str, Any]:
    """A row of `benchmarks.accuracy`; the dense model has a perplexity of 10 on both texts."""
    return {
        "method": method,
        "pattern": pattern,
        "perplexity": {"in domain": domain, "novels": novels},
        "ratio": {"in domain": domain / 10, "novels": novels / 10},
        "processor_seconds": 90.0 if pattern else None,
        "servable": "global" not in method,
    }


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
        row("2:4", 1, 32, **speed(99, 9), benchmark="latency"),
    ]
    assert tables.VIEWS["overview"]({"rows": rows}).splitlines() == [
        "| variant | 1 sequence, tokens/s | 8 sequences | 32 sequences "
        "| first token of a prompt of 512 | resident MiB |",
        "|---|---|---|---|---|---|",
        "| dense | 5.0 (1.00x) |  |  | 1000 ms (1.00x) | 4000 (1.00x) |",
        "| 2:4 | 10.0 (2.00x) | 40.0 (1.50x) |  | 800 ms (1.25x) | 2500 (0.62x) |",
        "| int4 | refused |  |  |  |  |",
    ]


def test_efforts_are_shown_beside_dense() -> None:
    rows = [
        {"effort": "dense", "perplexity": {"in domain": 20, "novels": 40}},
        {"effort": "low", "processor_minutes": 14.9, "perplexity": {"in domain": 30, "novels": 50}},
    ]
    assert tables.VIEWS["efforts"]({"rows": rows}).splitlines() == [
        "| effort | in domain | novels | processor minutes |",
        "|---|---|---|---|",
        "| dense | 20.0 (1.00x) | 40.0 (1.00x) |  |",
        "| low | 30.0 (1.50x) | 50.0 (1.25x) | 15 |",
    ]


def test_accuracy_is_the_mean_over_seeds() -> None:
    rows = [
        accuracy_row("dense", None, 10, 10),
        accuracy_row("learned", "2:4", 20, 30),
        accuracy_row("learned", "2:4", 22, 30),
        accuracy_row("cp-global", "4:8", 15, 16),
    ]
    assert tables.VIEWS["accuracy-2:4"]({"rows": rows}).splitlines() == [
        "| method | in domain | novels | seeds | processor minutes |",
        "|---|---|---|---|---|",
        "| dense | 10.0 (1.00x) | 10.0 (1.00x) |  |  |",
        "| `learned` | 21.0 (2.10x, 2.00-2.20) | 30.0 (3.00x, 3.00-3.00) | 2 | 1.5 |",
    ]
    assert tables.VIEWS["accuracy"]({"rows": rows}).splitlines()[-1] == (
        "| `cp-global` (through the whole layer, no checkpoint) | 4:8 | 15.0 (1.50x) "
        "| 16.0 (1.60x) | 1 | 1.5 |"
    )


def test_accuracy_of_int8_values_and_of_texts_that_came_later() -> None:
    old = accuracy_row("wanda+cp", "2:4", 20, 30) | {"processor_seconds": None}
    more = accuracy_row("wanda+cp", "2:4", 20, 30) | {"values": "int8"}
    more["perplexity"]["manual"], more["ratio"]["manual"] = 50, 5
    table = tables.VIEWS["accuracy-2:4"]({"rows": [more, old]}).splitlines()
    assert table[0] == "| method | in domain | novels | manual | seeds | processor minutes |"
    name = "| `wanda+cp` (in blocks), int8 values"
    assert table[2].startswith(f"{name}, weights alone | 20.0 (2.00x) | ")
    assert table[2].endswith("| 50.0 (5.00x) | 1 | 1.5 |")
    assert table[3].endswith("|  | 1 |  |")
    served = tables.VIEWS["accuracy-2:4"]({"rows": [more | {"evaluated": "kernels"}]})
    assert f"{name}, as served | 20.0" in served


def test_a_study_shows_every_cell_but_the_refused_ones() -> None:
    def texts(domain: float, novels: float) -> dict[str, float]:
        return {"in domain": domain, "novels": novels}

    rows = [
        {"method": "dense", "perplexity": texts(20, 40), "date": "2030-01-02", "commit": "abc"},
        {"method": "a", "block_size": 128, "refused": "because"},
        {"method": "a", "block_size": 64, "seconds": 12.4, "perplexity": texts(30, 50)},
        {
            "method": "b",
            "seconds": 6.94,
            "loss": 0.12345,
            "learned": [1, 2],
            "perplexity": texts(25, 44),
        },
    ]
    assert tables.VIEWS["study"]({"rows": rows}).splitlines() == [
        "| method | block size | processor seconds | loss | perplexity, in domain | x dense "
        "| perplexity, novels | x dense |",
        "|---|---|---|---|---|---|---|---|",
        "| dense |  |  |  | 20.0 | 1.00 | 40.0 | 1.00 |",
        "| a | 64 | 12 |  | 30.0 | 1.50 | 50.0 | 1.25 |",
        "| b |  | 6.9 | 0.123 | 25.0 | 1.25 | 44.0 | 1.10 |",
    ]


def test_learning_costs() -> None:
    steps = [
        {"width": 64, "loop": "dense", "seconds": 0.5, "peak_mib": 20.4, "assignments": 1},
        {"width": 64, "loop": "ours", "seconds": 0.25, "peak_mib": 10.0, "assignments": 1},
    ]
    table = tables.VIEWS["learning-steps"]({"steps": steps})
    assert table.splitlines()[2:] == ["| 64 | 0.500 | 0.250 | 2.0x | 20 | 10 |"]
    baseline = {"steps": 40, "seconds": 100.0, "perplexity": {"in domain": 80.0}}
    ours = {"steps": 10, "seconds": 25.0, "perplexity": {"in domain": 79.0}}
    table = tables.VIEWS["time-to-quality"]({"baseline": baseline, "ours": [ours]})
    assert table.splitlines()[2:] == [
        "| the paper's dense loop | 40 | 100 | 1.00 | 80.0 |",
        "| ours | 10 | 25 | 0.25 | 79.0 |",
    ]
    references = {"dense": {"in domain": 20.0}, "wanda": {"in domain": 150.0}}
    known = {"baseline": baseline, "ours": [ours], "references": references}
    assert tables.VIEWS["time-to-quality"](known).splitlines() == [
        "| loop | steps | seconds | share of time | perplexity, in domain | x dense | x Wanda |",
        "|---|---|---|---|---|---|---|",
        "| dense model |  |  |  | 20.0 | 1.00 | 0.13 |",
        "| Wanda, nothing learned |  |  |  | 150.0 | 7.50 | 1.00 |",
        "| the paper's dense loop | 40 | 100 | 1.00 | 80.0 | 4.00 | 0.53 |",
        "| ours | 10 | 25 | 0.25 | 79.0 | 3.95 | 0.53 |",
    ]


def test_whole_prunes_are_split_into_their_parts() -> None:
    def part(seconds: float, **more: int) -> dict[str, float]:
        return {"seconds": 9.0, "processor_seconds": seconds, "peak_bytes": 1 << 20, **more}

    row = {"seconds": 90.0, "processor_seconds": 60.0, "peak_bytes": 3 << 20}
    learned = {"calibration": part(10), "learning": part(150.4, steps=100)}
    rows = [
        row | {"method": "permllm-wanda", "processor_seconds": 240.0, "parts": learned},
        row | {"method": "ria+cp", "parts": {"calibration": part(20), "evaluation": part(4)}},
    ]
    assert tables.VIEWS["pipeline"]({"rows": rows}).splitlines() == [
        "| method | minutes | processor minutes | x `ria+cp` | peak MiB "
        "| start, reading, writing, processor s | calibration, processor s | learning, processor s "
        "| evaluation, processor s | a step, processor s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        "| `permllm-wanda` | 1.5 | 4.0 | 4.0 | 3 | 80 | 10 | 150 |  | 1.50 |",
        "| `ria+cp` | 1.5 | 1.0 | 1.0 | 3 | 36 | 20 |  | 4 |  |",
    ]


def test_a_profile_adds_up() -> None:
    rows = [{"part": "head", "milliseconds": 1.0}, {"part": "rest", "milliseconds": 3.0}]
    assert tables.VIEWS["profile"]({"rows": rows}).splitlines()[2:] == [
        "| head | 1.0 | 25% |",
        "| rest | 3.0 | 75% |",
        "| together | 4.0 | 100% |",
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


def test_a_table_appears_when_its_rows_are_recorded(tmp_path: Path) -> None:
    page, record = tmp_path / "page.md", tmp_path / "new.json"
    empty = "<!-- table: new vllm-bench -->\n<!-- end -->\nafter\n"
    rows = [{"benchmark": "decode", "variant": "dense"}]
    record.write_text(json.dumps(RECORD | {"rows": rows}))
    page.write_text(empty)
    assert tables.updated(page, tmp_path) == empty
    bench = {"benchmark": "latency", "variant": "dense", "batch": 1, "prompt_tokens": 32}
    record.write_text(json.dumps(RECORD | {"rows": [*rows, bench | {"seconds": 2.5}]}))
    full = tables.updated(page, tmp_path)
    assert "\n| dense | 1 | 32 | 2.50 s |  |  |  |  |\n\n<sub>[new.json]" in full
    page.write_text(full)
    record.write_text(json.dumps(RECORD | {"rows": rows}))
    assert tables.updated(page, tmp_path) == empty
