"""Quality of the models of records: what they are called, their bits, and what seeds say."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import quality
from benchmarks.figures import QUALITY, draw, shown
from benchmarks.quality import dense_bits, qualities
from benchmarks.tables import RESULTS


def row(method: str, ratio: float, **more: Any) -> dict[str, Any]:
    texts = {"novels": ratio, "manual": 2 * ratio}
    return {"method": method, "pattern": "2:4", "values": "bfloat16", "ratio": texts, **more}


OLD_DENSE = {
    "rows": [
        {"values": values, "group": None, "ratio": {"novels": ratio, "manual": ratio}}
        for values, ratio in (("bfloat16", 1.0), ("int8", 1.03), ("int4", 1.25))
    ]
}
ACCURACY = {
    "effort": "low",
    "rows": [
        row("dense", 1.0, pattern=None),
        row("wanda", 5.0),
        row("ria+cp-global", 4.0, servable=False),
        row("permllm-best", 1.5, processor_seconds=600),
        row("permllm-best", 1.75, processor_seconds=1800),
        row("permllm-best", 2.0, values="int8"),
    ],
}
EFFORTS = {
    "rows": [
        row("dense", 1.0, pattern=None, effort=None, bits_per_weight=16.0),
        row("dense", 3.0, pattern=None, effort=None, values="int3", bits_per_weight=3.25),
        row("permllm-best", 1.3, pattern="32:64", effort="high", bits_per_weight=9.01),
    ]
}


def link(name: str, text: str) -> str:
    return f"{text} in {name}"


def test_the_models_of_a_record_have_a_line_each() -> None:
    assert quality.methods(ACCURACY).splitlines() == [
        "| model | bits a weight | novels | manual | processor minutes |",
        "|---|---|---|---|---|",
        "| dense bfloat16 | 16.00 | 1.00 | 2.00 |  |",
        "| 2:4 bfloat16, `wanda` | 9.00 | 5.00 | 10.00 |  |",
        "| 2:4 bfloat16, `ria+cp-global` (no checkpoint) | 9.00 | 4.00 | 8.00 |  |",
        "| 2:4 bfloat16, effort low | 9.00 | 1.62 (1.50 to 1.75) | 3.25 (3.00 to 3.50) | 20 |",
        "| 2:4 int8, effort low | 5.00 | 2.00 | 4.00 |  |",
    ]


def test_dense_models_stand_once_beside_the_default_methods() -> None:
    records = {"a": OLD_DENSE, "b": ACCURACY, "c": EFFORTS}
    assert [
        line.split(" | ")[:2] for line in quality.default_method(records, link).splitlines()[2:]
    ] == [
        ["| dense bfloat16 in a", "16.00"],
        ["| dense int8 (W8A8) in a", "8.00"],
        ["| dense int4, groups of 64 in a", "4.25"],
        ["| 2:4 bfloat16, effort low in b", "9.00"],
        ["| 2:4 int8, effort low in b", "5.00"],
        ["| dense int3, groups of 64 in c", "3.25"],
        ["| 32:64 bfloat16, effort high in c", "9.01"],
    ]


def test_a_text_that_a_seed_lacks_is_left_out() -> None:
    rows = [row("wanda", 5.0), row("wanda", 6.0) | {"ratio": {"novels": 6.0}}]
    (found,) = qualities({"rows": rows})
    assert found.ratios == {"novels": [5.0, 6.0]}


@pytest.mark.parametrize(
    ("values", "bits"), [("bfloat16", 16), ("int8", 8), ("int4", 4.25), ("int3", 3.25)]
)
def test_a_dense_weight_has_its_share_of_a_scale(values: str, bits: float) -> None:
    assert dense_bits(values) == bits


def test_figures_are_those_that_pages_show(tmp_path: Path) -> None:
    pages = ["![a](figures/quality-smollm2.svg)", "![b](figures/serving-cpu-zen4.svg)"]
    assert shown(pages) == ["quality-smollm2", "serving-cpu-zen4"]
    drawn = draw(shown(pages), RESULTS, tmp_path)
    first, second = (path.read_text(encoding="utf-8") for path in drawn)
    assert all(word in first for word in ("bits a weight", "2:4, effort low", "dense", "manual"))
    assert "decode tokens/s" in second
    again = draw(["quality-smollm2"], RESULTS, tmp_path)[0].read_text(encoding="utf-8")
    assert first == again
    assert set(QUALITY) == {"quality-smollm2"}
