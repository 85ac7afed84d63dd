"""The table of patterns: of each, the time that it takes beside 2:4."""

from benchmarks.cpu.kernel_tables import patterns


def row(n: int, pattern: str, m: int, us: float) -> dict[str, object]:
    return {"n": n, "k": 64, "pattern": pattern, "value_dtype": "int8", "m": m, "ours_us": us}


def test_patterns_are_compared_shape_by_shape() -> None:
    times = {(8, "2:4"): 10.0, (16, "2:4"): 20.0, (8, "8:16"): 11.0, (16, "8:16"): 26.0}
    rows = [row(n, pattern, 4, us) for (n, pattern), us in times.items()]
    last = patterns({"rows": rows}).splitlines()[-1]
    assert last == "| 8:16 | int8 | 1.20 (1.10 to 1.30) |"
