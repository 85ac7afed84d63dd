"""Tables of several records: a line for each, ranges over shapes, links to where numbers stand."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import summaries, tables


def decoded(variant: str, batch: int, ratio: float, prompt: int = 32) -> dict[str, Any]:
    return {
        "variant": variant,
        "batch": batch,
        "prompt_tokens": prompt,
        "decode_ratio": ratio,
    }


def product(values: str, k: int, m: int, ratio: float, peer_values: str = "bfloat16") -> Any:
    return {
        "n": 64,
        "k": k,
        "m": m,
        "pattern": "2:4",
        "value_dtype": values,
        "peer_values": peer_values,
        "peer_us": 100.0 * ratio,
        "ratio": ratio,
    }


SERVED = {
    "date": "2030-01-02",
    "model": "random-tinyllama",
    "rows": [
        decoded("dense bfloat16", 1, 1.0),
        decoded("2:4 bfloat16", 1, 2.04),
        decoded("2:4 bfloat16", 8, 1.96),
        decoded("2:4 bfloat16", 32, 1.24),
        decoded("2:4 int8", 1, 3.0),
        decoded("2:4 int8", 1, 9.0, prompt=512),
        {"variant": "vLLM int4 (GPTQ)", "batch": 1, "prompt_tokens": 32, "refused": "no"},
    ],
}
MULTIPLIED = {
    "date": "2030-01-04",
    "rows": [
        product("bfloat16", 8, 1, 2.0),
        product("bfloat16", 8, 1, 3.0),  # a slower peer
        product("bfloat16", 16, 1, 2.51),
        product("bfloat16", 8, 4, 1.04),
        product("int8", 8, 4, 1.25, "int8"),
    ],
}


def link(name: str, text: str) -> str:
    return f"{text} in {name}"


def test_decoding_has_a_line_per_record_and_the_batches_that_were_measured() -> None:
    found = summaries.decode({"serving-cpu-zen4-some": SERVED}, link).splitlines()
    assert found[2:] == [
        "| tinyllama in serving-cpu-zen4-some | AMD Zen 4 | 2.0x / 2.0x / 1.2x | 3.0x |  |  |  |"
    ]
    found = summaries.peers({"serving-cpu-zen4-some": SERVED}, link).splitlines()
    assert found[0] == (
        "| shape of | CPU | 2:4 bfloat16 | 2:4 int8 | vLLM int8 (W8A8) | vLLM int4 (GPTQ) |"
    )
    assert found[2].endswith("| AMD Zen 4 | 2.0x / 2.0x / 1.2x | 3.0x |  |  |")


def test_int4_values_have_a_column_where_a_record_has_them() -> None:
    row = {**SERVED["rows"][0], "variant": "2:4 int4", "decode_ratio": 3.5}
    records = {"serving-cpu-zen4-some": SERVED, "serving-cpu-zen3": {**SERVED, "rows": [row]}}
    found = summaries.peers(records, link).splitlines()
    assert "| 2:4 int8 | 2:4 int4 | vLLM int8 (W8A8) |" in found[0]
    assert found[2].endswith("| 3.0x |  |  |  |")
    assert "|  |  | 3.5x |" in found[3]


def test_layers_have_ranges_over_shapes_of_the_fastest_peers() -> None:
    found = summaries.layers({"kernels-cpu-amx": MULTIPLIED}, link).splitlines()
    where = "Intel Xeon, AMX in kernels-cpu-amx"
    assert found == [
        "| CPU | values | M = 1 | M = 4 |",
        "|---|---|---|---|",
        f"| {where} | 2:4 bfloat16 | 2.0 to 2.5 | 1.0 |",
        f"| {where} | 2:4 int8, to vLLM's dense int8 |  | 1.2 |",
    ]


def test_a_block_names_its_records_and_when_they_were_made(tmp_path: Path) -> None:
    earlier = {**SERVED, "date": "2029-12-31"}
    for name, result in (("serving-cpu-amx", SERVED), ("serving-cpu-zen5", earlier)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    names = "serving-cpu-amx serving-cpu-zen5"
    found = tables.block(names, "decode-of-all", tmp_path / "docs", tmp_path)
    assert found.startswith(f"<!-- table: {names} decode-of-all -->\n")
    assert "[tinyllama](../serving-cpu-zen5.json) | AMD Zen 5 |" in found
    assert found.endswith("<sub>measured 2029-12-31 to 2030-01-02</sub>\n<!-- end -->")
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text(f"before\n<!-- table: {names} decode-of-all -->\n<!-- end -->\nafter\n")
    assert tables.updated(page, tmp_path) == f"before\n{found}\nafter\n"


def test_fragmented_memory_is_said_beside_the_machine(tmp_path: Path) -> None:
    def record(share: float | None) -> dict[str, Any]:
        rows = [{**row, "small_pages": share} for row in MULTIPLIED["rows"]]
        return {**MULTIPLIED, "rows": rows}

    for name, share in (("zen4", 0.79), ("zen5", 0.8), ("amx", None)):
        file = tmp_path / f"kernels-cpu-{name}.json"
        file.write_text(json.dumps(record(share)), encoding="utf-8")
    whole = "kernels-cpu-zen5 kernels-cpu-amx"
    found = tables.block(f"kernels-cpu-zen4 {whole}", "layers-of-all", tmp_path, tmp_path)
    assert "[AMD Zen 4 †](kernels-cpu-zen4.json)" in found
    assert "[AMD Zen 5](kernels-cpu-zen5.json)" in found
    assert "[Intel Xeon, AMX](kernels-cpu-amx.json)" in found
    assert "measured 2030-01-04; † in fragmented memory (small pages below 80% of" in found
    assert "†" not in tables.block(whole, "layers-of-all", tmp_path, tmp_path)


def test_a_machine_is_known() -> None:
    with pytest.raises(KeyError):
        summaries.machine("serving-cpu-abacus")
