"""What the kernel benchmark computes from its times."""

import pytest

from benchmarks.kernels import Row, complete, table


def row(m, peer, peer_us, ours_us, **changes):
    values = {
        "n": 100, "k": 64, "m": m, "pattern": "2:4", "value_dtype": "bfloat16", "isa": "abacus",
        "threads": 1, "peer": peer, "peer_values": "bfloat16", "peer_us": peer_us,
        "peer_huge_pages_us": None, "ours_us": ours_us, "ratio": peer_us / ours_us,
        "packed_bytes": 7200, "stream_floor_us": 0.0, "ideal_dense_us": 0.0, "ours_gflops": 1.0,
        "relative_error": 0.0, **changes,
    }  # fmt: skip
    return Row(**values)


def test_bounds_come_from_the_best_rates():
    rows = [row(1, "a", 640.0, 320.0), row(100, "a", 6400.0, 6000.0), row(1, "b", 500.0, 320.0)]
    few, many, other = complete(rows, 20.0, {(100, 64, 1, "b"): 400.04})
    assert few.stream_floor_us == 360.0
    assert few.ideal_dense_us == 640.0  # 12800 bytes at 20 a microsecond
    assert many.ideal_dense_us == 6400.0  # the peer itself has the best rate of the run
    assert few.peer_huge_pages_us is None
    assert other.peer_huge_pages_us == 400.0


def test_int8_peers_set_no_bound_and_no_ratio():
    rows = [
        row(8, "a", 600.0, 300.0, value_dtype="int8"),
        row(8, "a int8", 100.0, 300.0, value_dtype="int8", peer_values="int8"),
    ]
    completed = complete(rows, 1e9, {})
    assert completed[0].ideal_dense_us == pytest.approx(600.0)
    shown = table(completed, "int8")
    assert [list(column.cells) for column in shown.columns][6] == ["2.00x"]
