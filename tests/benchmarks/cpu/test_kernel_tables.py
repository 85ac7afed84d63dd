"""Marks in the tables of the kernels."""

from typing import Any

from benchmarks.cpu.kernel_tables import ratios_and_aims


def row(m: int, values: str, ratio: float, threads: int = 1) -> dict[str, Any]:
    return {
        "n": 64, "k": 64, "m": m, "pattern": "2:4", "value_dtype": values, "isa": "avx512_bf16",
        "threads": threads, "peer": "torch", "peer_values": "bfloat16", "peer_us": ratio,
        "ours_us": 1.0, "ratio": ratio,
    }  # fmt: skip


def test_an_aim_that_is_missed_stands_beside_the_ratio() -> None:
    rows = [row(1, "bfloat16", 3.996), row(4, "bfloat16", 1.7), row(1, "int8", 6.2)]
    rows.append(row(1, "int4", 1.0))  # which have no aim
    lines = ratios_and_aims({"rows": rows}).splitlines()
    assert lines[2:5] == [
        "| 64 x 64 | bfloat16 | 4.00 (4) | 1.70 |",
        "| 64 x 64 | int8 | 6.20 |  |",
        "| 64 x 64 | int4 | 1.00 |  |",
    ]
    assert lines[-1] == "In brackets: the project target, where a cell misses it (1 of 3 cells)."


def test_more_threads_have_no_aim() -> None:
    table = ratios_and_aims({"rows": [row(1, "bfloat16", 1.0, threads=2)]})
    assert table.splitlines()[-1] == "| 64 x 64 | bfloat16 | 1.00 |"
