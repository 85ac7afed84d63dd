"""Which kernels are forced, one against the other; nothing is timed here."""

import json

import pytest
import torch

from benchmarks.cuda import INCOMPLETE, choices
from benchmarks.cuda import contestants as cuda_contestants
from benchmarks.cuda.contestants import INT8, OURS, UNPERMUTED, maker, with_values_of
from benchmarks.cuda.kernels import Row
from benchmarks.shapes import random_layer


class Library:
    """The operators that tell, and force, kernels."""

    def __init__(self, built):
        self.built, self.forced = built, [""]

    def cutlass_architectures(self):
        return self.built

    def force_linear_kernel(self, choice):
        self.forced.append(choice)


@pytest.fixture
def operators(monkeypatch):
    def pretend(capability=(9, 0), built="90"):
        pretended = Library(built)
        monkeypatch.setattr(torch.ops, "permllm", pretended)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        return pretended

    return pretend


@pytest.mark.parametrize(
    ("capability", "built", "kernels"),
    [
        ((9, 0), "90", ["many_tokens_sm90:64", "many_tokens_sm90:128", "many_tokens_sm90:256"]),
        ((9, 0), "", ["many_tokens_mma:64", "many_tokens_mma:128"]),
        ((8, 0), "90", ["many_tokens_mma:64", "many_tokens_mma:128"]),
        ((10, 0), "90 100", [f"many_tokens_sm100:{tile}" for tile in (64, 128, 256)]),
    ],
)
def test_kernels_of_this_gpu_are_forced(operators, capability, built, kernels):
    operators(capability, built)
    assert choices.forced_kernels() == kernels
    names = choices.contestants(128)
    assert {OURS, UNPERMUTED, INT8, "few_tokens", "few_tokens, int8"} < {*names}
    assert {*kernels} < {*names}
    assert not any(":64" in name or "few" in name for name in choices.contestants(4096))
    few = choices.contestants(1)
    assert {OURS, INT8, "few_tokens:128:2", "few_tokens:128:2, int8"} < {*few}
    assert not any("many" in name or ":192" in name for name in few)
    assert {"few_tokens:256", "few_tokens:192, int8"} < {*choices.contestants(64)}


@pytest.mark.parametrize(
    "name", ["few_tokens:192", "few_tokens, no permutation", "few_tokens, int8"]
)
def test_a_kernel_is_forced_for_its_calls_alone(operators, monkeypatch, name):
    pretended, given = operators(), []

    def multiply(x, packed, metadata, permutation, *rest):
        given.append((pretended.forced[-1], permutation is None, packed.dtype))
        if x is None:
            raise ValueError("it is refused")

    monkeypatch.setattr(cuda_contestants.ops, "sparse_linear", multiply)
    call, _ = maker(name)(with_values_of(name, random_layer(24, 128)), 2)
    call(torch.zeros(1))
    with pytest.raises(ValueError, match="refused"):
        call(None)
    kernel, _, option = name.partition(", ")
    dtype = torch.int8 if option == "int8" else torch.bfloat16
    assert given == [(kernel, option == "no permutation", dtype)] * 2
    assert pretended.forced == ["", kernel, "", kernel, ""]


@pytest.fixture
def measured(operators, monkeypatch):
    operators()
    card = type("Card", (), {"speed": 1.0, "facts": lambda self: {"gpu": "H100"}})
    monkeypatch.setattr(choices, "this_card", card)
    monkeypatch.setattr(choices, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(choices, "on_gpu", lambda layer: layer)

    def measure(layer, tokens, names, speed):
        for m in tokens:
            yield [Row(*layer.dense.shape, m, name, 2.0, 1.0, 1e-3) for name in names]

    monkeypatch.setattr(choices, "measure", measure)


def test_choices_are_written(measured, tmp_path):
    choices.run([(64, 128)], [65, 4096], tmp_path / "choices.json", 100)
    found = json.loads((tmp_path / "choices.json").read_text())
    assert found["left_out"] == []
    assert {(row["tokens"], row["contestant"]) for row in found["rows"]} == {
        (m, name) for m in (65, 4096) for name in choices.contestants(m)
    }


def test_who_gave_no_result_is_left_out(measured, monkeypatch, tmp_path):
    """A wrong result, or a failed launch: nobody may take it for a pass."""

    def measure(layer, tokens, names, speed):
        for m in tokens:
            names[:] = [name for name in names if name != "few_tokens:192"]
            rows = [name for name in names if name != "few_tokens"]
            yield [Row(*layer.dense.shape, m, name, 2.0, 1.0, 1e-3) for name in rows]

    monkeypatch.setattr(choices, "measure", measure)
    with pytest.raises(SystemExit):
        choices.run([(64, 128), (64, 256)], [65], tmp_path / "choices.json", 100)
    found = json.loads((tmp_path / "choices.json").read_text())
    assert found["left_out"] == [
        f"64 x {k}, 65 tokens: few_tokens; few_tokens:192" for k in (128, 256)
    ]


def test_what_no_time_was_left_for_is_said(measured, capsys):
    with pytest.raises(SystemExit) as exit_:
        choices.run([(64, 128)], [65], None, 0)
    assert exit_.value.code == INCOMPLETE
    assert "64 x 128, 65 tokens: permllm, no permutation; few_tokens" in capsys.readouterr().out
