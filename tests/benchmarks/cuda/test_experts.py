"""Experts on a GPU: the dense peer, where tokens go, and what is said; nothing is timed here."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch.nn.functional import silu

from benchmarks.cuda import INCOMPLETE, card, experts
from benchmarks.cuda.experts import DENSE, INT8, OURS, Row, incomplete, table
from benchmarks.shapes import ExpertShape

SHAPE = ExpertShape(experts=6, choices=2, hidden=128, inner=64)


def row(tokens, contestant, us, model="olmoe-1b-7b"):
    return Row(model, tokens, contestant, us, floor_us=1.0, relative_error=1e-3)


@pytest.fixture
def on_the_cpu(monkeypatch):
    """Every contestant; in the place of ours the dense one, with weights in bfloat16."""

    def ours(shape, layers):
        rounded = tuple(
            [dataclasses.replace(layer, dense=layer.dense.bfloat16()) for layer in distinct]
            for distinct in layers
        )
        return dataclasses.replace(
            experts.grouped(shape, rounded),
            **dict(zip(("gate_up", "down"), experts._dense(layers), strict=True)),
        )

    monkeypatch.setattr(experts, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setitem(experts.EXPERTS, "olmoe-1b-7b", SHAPE)
    monkeypatch.setattr(experts, "captured", lambda calls, given: lambda: calls[0](*given))
    monkeypatch.setattr(experts, "medians", lambda turns, _: dict.fromkeys(turns, 2.0))
    monkeypatch.setattr(experts, "sparse", ours)


def by_loops(x, weights, ids, gate_up, down):
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ row).chunk(2)
            y[token] += weight * (down[expert].double() @ (silu(gate) * up))
    return y


@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_the_dense_peer_is_the_sum_of_its_experts(tokens):
    """The first expert and the last have no token."""
    gate_up, down = torch.randn(6, 128, 64) / 8, torch.randn(6, 64, 64) / 8
    x = torch.randn(tokens, 64)
    weights, ids = torch.rand(tokens, 4).topk(2)
    ids = (ids + 1).to(torch.int32)
    given = [part.bfloat16() for part in (gate_up, down)]
    y = experts.grouped_product(x.bfloat16(), weights, ids, *given)
    expected = by_loops(x.bfloat16(), weights, ids, *given)
    assert ((y.double() - expected).norm() / expected.norm()) < 1e-2


def test_tokens_are_spread_evenly_and_go_to_others_in_the_next_call(on_the_cpu):
    calls = itertools.islice(experts.routes(SHAPE, 3), 4)
    found = torch.cat([ids.flatten() for _, ids in calls])
    assert found.tolist() == [number % 6 for number in range(24)]


def test_every_contestant_is_checked_and_timed(on_the_cpu):
    found = list(experts.measure("olmoe-1b-7b", (1, 5), speed=1e3, end=float("inf")))
    assert [[(one.tokens, one.contestant) for one in rows] for rows in found] == [
        [(m, name) for name in (OURS, DENSE, INT8)] for m in (1, 5)
    ]
    assert all(0 < one.relative_error < experts.ERROR_LIMIT for rows in found for one in rows)
    floors = {one.contestant: one.floor_us for one in found[0]}
    assert floors[OURS] / floors[DENSE] == pytest.approx(1.125 / 2, rel=1e-2)


def test_a_wrong_result_is_not_timed(on_the_cpu, monkeypatch, capsys):
    right = experts.grouped_product
    monkeypatch.setattr(experts, "grouped_product", lambda *given: right(*given) * 1.1)
    assert list(experts.measure("olmoe-1b-7b", (1,), speed=1e3, end=float("inf"))) == [[]]
    assert "no permllm: its relative error is" in capsys.readouterr().out


def test_nothing_is_begun_when_time_is_up(on_the_cpu):
    assert list(experts.measure("olmoe-1b-7b", (1, 5), speed=1e3, end=0)) == []


def test_the_table_has_what_others_take_of_ours():
    rows = [row(1, OURS, 2.0), row(1, DENSE, 3.0), row(4, OURS, 5.0), row(4, INT8, 4.0)]
    first, second = table(rows).splitlines()[1:]
    assert first.split() == ["olmoe-1b-7b", "1", "2.0", "us", "1.00x", "-", "3.0", "us", "1.50x"]
    assert second.split() == ["olmoe-1b-7b", "4", "5.0", "us", "1.00x", "4.0", "us", "0.80x", "-"]


def test_what_is_missing_of_ours_fails(on_the_cpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(card, "fallback_reason", lambda *_: "")
    monkeypatch.setattr(card, "bandwidth", lambda: 1e3)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    file = tmp_path / "experts.json"
    experts.run(["olmoe-1b-7b"], [1], file, 600)
    assert len(json.loads(file.read_text())["rows"]) == 3
    with pytest.raises(SystemExit) as exit_:
        experts.run(["olmoe-1b-7b"], [1], file, -1)
    assert exit_.value.code == INCOMPLETE
    assert "left out, in whole or in part: olmoe-1b-7b" in capsys.readouterr().out
    rows = [row(1, name, 1.0) for name in (OURS, DENSE)]
    assert incomplete(rows, ["olmoe-1b-7b"], [1]) == ["olmoe-1b-7b"]
