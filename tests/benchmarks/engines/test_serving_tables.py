"""Tables of the documentation on serving."""

from typing import Any

from benchmarks import tables


def serving_row(
    variant: str, batch: int, prompt: int, speed: float, **more: float
) -> dict[str, Any]:
    """A row of `benchmarks.serving`; dense decodes 10 tokens a second."""
    return {
        "variant": variant,
        "batch": batch,
        "prompt_tokens": prompt,
        "decode_tokens_per_second": speed,
        "decode_ratio": speed / 10,
        "time_to_first_token_ms": 123.6,
        "first_token_ratio": 1.5,
        **more,
    }


def test_serving_shows_what_was_measured() -> None:
    rows = [
        serving_row("dense", 1, 32, 10, resident_mib=100.2),
        serving_row("dense", 8, 512, 10, resident_mib=150.6),
        serving_row("2:4", 1, 32, 25, resident_mib=70.0, resident_ratio=0.7, peak_mib=80.4),
        serving_row("2:4", 8, 32, 25, resident_mib=90.0, resident_ratio=0.6, peak_mib=95.6),
    ]
    assert tables.VIEWS["decode"]({"rows": rows}).splitlines() == [
        "| variant | batch 1, prompt 32 | batch 8, prompt 512 | batch 8, prompt 32 "
        "| resident MiB | peak MiB |",
        "|---|---|---|---|---|---|",
        "| dense | 10.0 (1.00x) | 10.0 (1.00x) |  | 151 |  |",
        "| 2:4 | 25.0 (2.50x) |  | 25.0 (2.50x) | 90 (0.60x) | 96 |",
    ]
    without = tables.VIEWS["decode"]({"rows": [serving_row("2:4", 1, 32, 25)]})
    assert "MiB" not in without


def test_serving_shows_bytes_loading_and_what_was_refused() -> None:
    loaded = {"resident_mib": 90.0, "load_seconds": 20.2, "packed_ratio": 0.5625}
    refused = {"variant": "int4", "batch": 1, "prompt_tokens": 32, "refused": "because of `x`"}
    rows = [serving_row("2:4", 1, 32, 25, byte_ratio=1.69, **loaded), refused]
    assert tables.VIEWS["decode"]({"rows": rows}).splitlines() == [
        "| variant | batch 1, prompt 32 | by bytes | pruned linears | resident MiB "
        "| load, s (one start) |",
        "|---|---|---|---|---|---|",
        "| 2:4 | 25.0 (2.50x) | 1.69x | 0.562x | 90 | 20 |",
        "| int4 | refused |  |  |  |  |",
        "",
        "int4 was refused: `because of 'x'`",
    ]
    alone = {name: value for name, value in rows[0].items() if not name.endswith("_ratio")}
    assert "| 2:4 | 25.0 | 90 | 20 |" in tables.VIEWS["decode"]({"rows": [alone]})


def test_loading_is_the_median_of_starts_however_many_cells_each_served() -> None:
    starts = [(20.0, 32), (20.0, 64), (20.0, 128), (30.0, 512), (50.0, 256)]
    rows = [
        serving_row("2:4", 1, prompt, 25, load_seconds=seconds, load_ratio=2.0)
        for seconds, prompt in starts
    ]
    table = tables.VIEWS["decode"]({"rows": rows})
    assert table.endswith("| 30 |")  # older records have a ratio, of one start to another
    assert "| load, s (median of 3) |" in table
    once = serving_row("dense", 1, 32, 10, load_seconds=15.0)
    assert "| load, s (median of 1-3) |" in tables.VIEWS["decode"]({"rows": [*rows, once]})
