"""What the kernel benchmark computes from its times."""

import json
import sys
from dataclasses import replace

import pytest

from benchmarks import kernels
from benchmarks.cpu import contestants
from benchmarks.cpu.kernel_rows import KEY, Row
from benchmarks.kernels import Plan, table
from benchmarks.records.rows import Rows
from permllm_vllm import ops


def row(m, peer, peer_us, ours_us, **changes):
    values = {
        "n": 100, "k": 64, "m": m, "pattern": "2:4", "value_dtype": "bfloat16", "isa": "abacus",
        "threads": 1, "peer": peer, "peer_values": "bfloat16", "peer_us": peer_us,
        "ours_us": ours_us, "ratio": peer_us / ours_us, "packed_bytes": 7200, "ours_gflops": 1.0,
        "relative_error": 0.0, "load_average": 0.5,
        **changes,
    }  # fmt: skip
    return Row(**values)


def test_a_run_measures_what_its_result_lacks(tmp_path, monkeypatch):
    calls = []

    def measure(shape, pattern, tokens, plan):
        calls.append((shape, pattern, tuple(tokens)))
        for m in tokens:
            yield [row(m, peer, 900.0, 400.0, n=shape[0], pattern=pattern) for peer in "ab"]

    monkeypatch.setattr(kernels, "measure", measure)
    plan = Plan([(100, 64)], [1, 4], ["2:4"], ["bfloat16"], threads=1, quick=True)

    def run(plan):
        calls.clear()
        result = Rows(tmp_path / "result.json", {"threads": 1}, KEY)
        return kernels.run(plan, result)

    assert len(run(plan)) == 4
    assert calls == [((100, 64), "2:4", (1, 4))]
    more = replace(plan, shapes=[(100, 64), (200, 64)], tokens=[4, 8], patterns=["2:4", "4:8"])
    assert len(run(more)) == 4 + 2 + 3 * 4
    assert calls[:2] == [((100, 64), "2:4", (8,)), ((100, 64), "4:8", (4, 8))]
    assert len(run(more)) == 18
    assert calls == []


def test_int8_peers_set_no_ratio():
    rows = [
        row(8, "a", 600.0, 300.0, value_dtype="int8"),
        row(8, "a int8", 100.0, 300.0, value_dtype="int8", peer_values="int8"),
    ]
    shown = table(rows, "int8")
    assert [list(column.cells) for column in shown.columns][6] == ["2.00x"]


def test_quick_rows_do_not_stay_in_a_full_result(tmp_path, monkeypatch, capsys):
    def measure(shape, pattern, tokens, plan):
        for m in tokens:
            yield [row(m, "a", 900.0, 400.0, n=shape[0], value_dtype=v) for v in plan.values]

    monkeypatch.setattr(kernels, "measure", measure)
    command = ["kernels", "--shapes", "100x64", "--json", str(tmp_path / "r")]
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
    command = ["kernels", "--shapes", "64x128", "--tokens", "3", "--quick"]
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
