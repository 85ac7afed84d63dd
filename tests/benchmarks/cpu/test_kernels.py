"""What the kernel benchmark computes from its times."""

import json
import sys
from dataclasses import asdict, replace

import pytest

from benchmarks import kernels
from benchmarks.cpu import contestants, kernel_rows
from benchmarks.cpu.kernel_rows import KEY, InHugePages, Row, complete
from benchmarks.kernels import Plan, table
from benchmarks.records.rows import Rows
from permllm_vllm import ops


def row(m, peer, peer_us, ours_us, **changes):
    values = {
        "n": 100, "k": 64, "m": m, "pattern": "2:4", "value_dtype": "bfloat16", "isa": "abacus",
        "threads": 1, "peer": peer, "peer_values": "bfloat16", "peer_us": peer_us,
        "peer_huge_pages_us": None, "ours_us": ours_us, "ratio": peer_us / ours_us,
        "packed_bytes": 7200, "plain_reading_us": 360.0, "stream_floor_us": 0.0,
        "ideal_dense_us": 0.0, "ours_gflops": 1.0, "relative_error": 0.0, "load_average": 0.5,
        **changes,
    }  # fmt: skip
    return Row(**values)


def test_bounds_come_from_the_best_rates():
    rows = [row(1, "a", 800.0, 400.0), row(100, "a", 6400.0, 6000.0), row(1, "b", 700.0, 400.0)]
    few, many, other = complete(rows, {(100, 64, 1, "b"): InHugePages(650.04, 30.0)})
    assert few.stream_floor_us == 360.0  # what does nothing else reads fastest
    assert few.ideal_dense_us == 640.0  # 12800 bytes at 20 a microsecond
    assert many.ideal_dense_us == 6400.0  # the peer itself has the best rate of the run
    assert few.peer_huge_pages_us is None
    assert (other.peer_huge_pages_us, other.peer_huge_pages_mib) == (650.0, 30.0)
    later = {"peer_huge_pages_mib": None, "small_pages": None}
    assert {*asdict(few)} - {*few.written()} == {*later}
    assert later | few.written() == asdict(few)
    assert later | other.written() == asdict(other)
    assert other.written()["peer_huge_pages_mib"] == 30.0


@pytest.mark.parametrize(
    ("fastest", "rate"),
    [
        (row(1, "a", 900.0, 300.0), 20.0),  # ours is no bound of itself
        (row(1, "a", 400.0, 500.0), 32.0),
        (row(1, "a", 400.0, 500.0, peer_values="int8"), 20.0),
        (row(1, "a", 900.0, 500.0, peer_huge_pages_us=320.0), 40.0),
    ],
    ids=["ours", "peer", "int8 peer", "huge pages"],
)
def test_nothing_but_ours_is_faster_than_the_floor(fastest, rate):
    completed = complete([row(1, "a", 900.0, 500.0), fastest, row(100, "a", 6400.0, 6000.0)])
    assert [r.stream_floor_us for r in completed] == [7200 / rate] * 3
    assert [r.ideal_dense_us for r in completed] == [round(12800 / rate, 1)] * 2 + [6400.0]
    assert complete(completed) == completed


def test_bounds_of_a_result_are_computed_anew(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    rows = Rows(path, {"threads": 1}, KEY)
    rows.update(r.written() for r in (row(1, "a", 900.0, 300.0), row(100, "a", 6400.0, 6000.0)))
    before = json.loads(path.read_text())
    monkeypatch.setattr("sys.argv", ["kernel_rows", str(path)])
    kernel_rows.main()
    after = json.loads(path.read_text())
    assert after["rows"][0].pop("stream_floor_us") == 360.0
    assert after["rows"][0].pop("ideal_dense_us") == 640.0
    for computed in ("stream_floor_us", "ideal_dense_us"):
        before["rows"][0].pop(computed)
        before["rows"][1].pop(computed)
        after["rows"][1].pop(computed)
    assert after == before


def test_a_run_measures_what_its_result_lacks(tmp_path, monkeypatch):
    calls = []

    def measure(shape, pattern, tokens, plan):
        calls.append((shape, pattern, tuple(tokens)))
        for m in tokens:
            yield [row(m, peer, 900.0, 400.0, n=shape[0], pattern=pattern) for peer in "ab"]

    def huge_pages(shape, tokens, peers, threads, *, quick, dtype):
        assert quick
        calls.append((shape, tokens, peers))
        return {(*shape, m, peer): InHugePages(800.0, 9.5) for m in tokens for peer in peers}

    monkeypatch.setattr(kernels, "measure", measure)
    monkeypatch.setattr(kernels, "times_with_huge_pages", huge_pages)
    plan = Plan([(100, 64)], [1, 4], ["2:4"], ["bfloat16"], threads=1, quick=True)

    def run(plan, huge_pages=False):
        calls.clear()
        result = Rows(tmp_path / "result.json", {"threads": 1}, KEY)
        return kernels.run(plan, result, huge_pages=huge_pages)

    assert len(run(plan)) == 4
    assert calls == [((100, 64), "2:4", (1, 4))]
    more = replace(plan, shapes=[(100, 64), (200, 64)], tokens=[4, 8], patterns=["2:4", "4:8"])
    assert len(run(more)) == 4 + 2 + 3 * 4
    assert calls[:2] == [((100, 64), "2:4", (8,)), ((100, 64), "4:8", (4, 8))]
    rows = run(plan, huge_pages=True)
    assert calls == [((100, 64), [1, 4, 8], ["a", "b"]), ((200, 64), [4, 8], ["a", "b"])]
    assert {(r.peer_huge_pages_us, r.peer_huge_pages_mib) for r in rows} == {(800.0, 9.5)}
    assert run(more, huge_pages=True) == rows
    assert calls == []


def test_int8_peers_set_no_bound_and_no_ratio():
    rows = [
        row(8, "a", 600.0, 300.0, value_dtype="int8"),
        row(8, "a int8", 100.0, 300.0, value_dtype="int8", peer_values="int8"),
    ]
    completed = complete(rows)
    assert completed[0].ideal_dense_us == pytest.approx(600.0)
    shown = table(completed, "int8")
    assert [list(column.cells) for column in shown.columns][6] == ["2.00x"]


def test_quick_rows_do_not_stay_in_a_full_result(tmp_path, monkeypatch, capsys):
    def measure(shape, pattern, tokens, plan):
        for m in tokens:
            yield [row(m, "a", 900.0, 400.0, n=shape[0], value_dtype=v) for v in plan.values]

    monkeypatch.setattr(kernels, "measure", measure)
    command = ["kernels", "--shapes", "100x64", "--no-huge-pages", "--json", str(tmp_path / "r")]
    monkeypatch.setattr(sys, "argv", [*command, "--quick"])
    kernels.main()
    kernels.main()
    quick = json.loads((tmp_path / "r").read_text())["rounds"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        kernels.main()
    assert "its rows have rounds" in capsys.readouterr().err
    (tmp_path / "r").unlink()
    kernels.main()
    full = json.loads((tmp_path / "r").read_text())["rounds"]
    assert all(0 < quick[size] < full[size] for size in ("few tokens", "many"))


@pytest.mark.parametrize(
    "option",
    [
        ["--threads", "1"],
        ["--patterns", "2:4"],
        ["--values", "int8"],
        ["--no-huge-pages"],
        ["--dtype", "float16"],
        ["--block-size", "128"],
    ],
    ids=lambda option: option[0],
)
def test_options_of_the_cpu_are_refused_for_a_gpu(option, monkeypatch, capsys):
    def run(*arguments, **options):
        raise AssertionError("nothing may be measured")

    monkeypatch.setattr(kernels.cuda_kernels, "run", run)
    monkeypatch.setattr(sys, "argv", ["kernels", "--device", "cuda", *option])
    with pytest.raises(SystemExit):
        kernels.main()
    assert f"{option[0]}: not for --device cuda" in capsys.readouterr().err


def test_a_block_that_does_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(kernels, "run", lambda *_, **__: pytest.fail("it measures"))
    command = ["kernels", "--shapes", "64x128", "64x96", "--block-size", "64"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        kernels.main()
    assert "--block-size 64: 64x96 has 96 inputs, no multiple" in capsys.readouterr().err


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peers_multiply_in_the_dtype_of_the_activations(dtype, tmp_path, monkeypatch, capsys):
    file = tmp_path / "result.json"
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)
    monkeypatch.setattr(kernels, "stream_rate", lambda threads: 1000.0)
    command = ["kernels", "--shapes", "64x128", "--tokens", "3", "--no-huge-pages", "--quick"]
    options = ["--dtype", dtype, "--block-size", "128", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    kernels.main()
    found = json.loads(file.read_text())
    assert (found["dtype"], found["block_size"]) == (dtype, 128)
    assert {row["peer_values"] for row in found["rows"]} == {dtype}
    assert {row["value_dtype"] for row in found["rows"]} == {"bfloat16", "int8"}
    monkeypatch.setattr(sys, "argv", [*command, "--json", str(file)])
    with pytest.raises(SystemExit):
        kernels.main()
    assert "its rows have" in capsys.readouterr().err
