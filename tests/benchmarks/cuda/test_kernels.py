"""The GPU benchmark without a GPU: PyTorch multiplies in place of the kernels."""

import json

import pytest
import torch

from benchmarks.cuda import kernels
from benchmarks.cuda.turns import LEAST_CALLS, medians, rotation


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Contestants that run here, without graphs; each call takes a microsecond more."""
    clock = iter(range(1, 1 << 20))

    def captured(calls, inputs):
        assert len(calls) == len(inputs)
        return lambda: float(next(clock))

    monkeypatch.setattr(kernels, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(kernels, "copies", lambda _: 2)
    monkeypatch.setattr(kernels, "captured", captured)
    for name in (kernels.OURS, kernels.UNPERMUTED, kernels.INT8):
        monkeypatch.setitem(kernels.CONTESTANTS, name, kernels.dense)


def fails(layer, count):
    raise RuntimeError("no such library\nand more")


def wrong(layer, count):
    contestant = kernels.dense(layer, count)
    return kernels.Contestant(contestant.calls, contestant.dense.flip(0))


def measured(names, tokens=(1, 130)):
    found = list(kernels.measure((64, 128), tokens, names, 1e3))
    return [row for rows, _ in found for row in rows], found[-1][1]


@pytest.mark.usefixtures("on_the_cpu")
def test_every_contestant_is_timed_in_turns():
    rows, lost = measured([kernels.OURS, kernels.DENSE])
    assert [(row.tokens, row.contestant) for row in rows] == [
        (m, name) for m in (1, 130) for name in (kernels.OURS, kernels.DENSE)
    ]
    assert rows[1].us == rows[0].us + 1
    assert rows[0].floor_us == round((64 * 128 * 1.125 + 2 * (64 + 128)) / 1e3, 2)
    assert all(0 < row.relative_error < kernels.ERROR_LIMIT for row in rows)
    assert not lost


@pytest.mark.usefixtures("on_the_cpu")
def test_what_fails_or_is_wrong_is_left_out(monkeypatch, capsys):
    monkeypatch.setitem(kernels.CONTESTANTS, "missing", fails)
    monkeypatch.setitem(kernels.CONTESTANTS, "wrong", wrong)
    rows, lost = measured([kernels.OURS, "missing", "wrong"])
    assert {row.contestant for row in rows} == {kernels.OURS}
    assert lost == ["missing", "wrong"]
    said = capsys.readouterr().out
    assert "64 x 128: no missing: no such library\n" in said
    assert "64 x 128: no wrong: its relative error is" in said


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("broken", [False, True])
def test_results_are_written_and_a_wrong_kernel_fails(broken, monkeypatch, tmp_path, capsys):
    if broken:
        monkeypatch.setitem(kernels.CONTESTANTS, kernels.INT8, wrong)
    monkeypatch.setattr(kernels, "fallback_reason", lambda *_: "")
    monkeypatch.setattr(kernels, "bandwidth", lambda: 1e3)
    monkeypatch.setattr(kernels, "measure_permutation", lambda *shape: {"shape": shape})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    file = tmp_path / "result.json"
    if broken:
        with pytest.raises(SystemExit, match=f"left out, see above: {kernels.INT8}"):
            kernels.run([(64, 128)], [1], file)
    else:
        kernels.run([(64, 128)], [1], file)
    result = json.loads(file.read_text())
    assert result["gpu"] == "a GPU"
    there = {row["contestant"] for row in result["rows"]}
    assert (kernels.INT8 in there) == (not broken)
    assert "floor" in capsys.readouterr().out


def test_says_why_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(kernels, "fallback_reason", lambda *_: "no GPU")
    with pytest.raises(SystemExit, match="the CUDA kernels do not run here: no GPU"):
        kernels.run()


def test_the_dense_weight_of_a_product_without_permutation_is_permuted(monkeypatch):
    monkeypatch.setattr(kernels, "CUDA", torch.device("cpu"))
    layer = kernels.random_layer(16, 128)
    found = kernels.unpermuted(layer, 1)
    x = torch.randn(3, 128).bfloat16()
    absolute = kernels.permutations.absolute(layer.weights.permutation, layer.weights.block_size)
    there = x[:, absolute].double() @ found.dense.double().t()
    assert torch.allclose(there, x.double() @ layer.dense.double().t())


@pytest.mark.parametrize(("calls", "inputs"), [(1, 1), (8, 8), (50, 50)])
def test_a_graph_makes_whole_rounds_and_many_calls(calls, inputs):
    order = rotation(calls, inputs)
    assert len(order) >= LEAST_CALLS
    assert len(order) % calls == 0
    assert {weight for weight, _ in order} == set(range(calls))


def test_the_first_round_does_not_count():
    log = []

    def turn(name):
        return lambda: log.append(name) or float(len(log))

    assert medians({"a": turn("a"), "b": turn("b")}, 1) == {"a": 3.0, "b": 4.0}
    assert log == ["a", "b", "a", "b"]
