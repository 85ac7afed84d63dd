"""What the benchmark of experts measures, and what it refuses to time."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.cpu import expert_contestants, experts
from benchmarks.cpu.contestants import has_vllm
from benchmarks.cpu.expert_contestants import OURS, VLLM, Contestant, contestants, random_experts
from benchmarks.cpu.products import WrongProduct, activations
from benchmarks.shapes import ExpertShape
from permllm_vllm import ops

SHAPE = ExpertShape(experts=4, choices=2, hidden=64, inner=64)
pytestmark = [
    pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built"),
    pytest.mark.skipif(not has_vllm(), reason="vLLM is not installed"),
]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (experts, kernels):
        monkeypatch.setattr(module, "EXPERTS", {"tiny": SHAPE})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_contestant_multiplies_by_the_same_weights() -> None:
    found = contestants(random_experts(SHAPE))
    assert {VLLM, f"{OURS} bfloat16", f"{OURS} int8"} <= set(found)
    for contestant in found.values():
        for tokens in (1, 3):
            assert contestant.checked(activations(tokens, SHAPE.hidden)) < 0.05


def test_calls_go_through_all_experts() -> None:
    seen: list[int] = []
    weights = random_experts(SHAPE)

    def call(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.flatten().tolist())
        return x

    contestant = Contestant("one", weights, call, 1, 0.05)
    for _ in range(3):
        contestant.time(activations(1, SHAPE.hidden), lambda: 0.0)
    assert seen == [0, 1, 2, 3, 0, 1]


def test_every_contestant_has_read_all_experts_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: dict[str, list[int]] = {}
    weights = random_experts(ExpertShape(experts=5, choices=2, hidden=64, inner=64))

    def stub(name: str) -> expert_contestants.Call:
        def call(x: torch.Tensor, router: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            seen.setdefault(name, []).extend(ids.flatten().tolist())
            return x

        return call

    monkeypatch.setattr(
        expert_contestants, "_sparse", lambda _, name: Contestant(name, weights, stub(name), 1, 1)
    )
    monkeypatch.setattr(expert_contestants, "_vllm", lambda *_: stub(VLLM))
    monkeypatch.setattr(expert_contestants, "_vllm_int8", lambda *_: stub("vllm int8"))
    names = contestants(weights)
    assert {name.removeprefix(f"{OURS} ") for name in names} == set(seen)
    assert all(set(ids) == set(range(5)) for ids in seen.values())


def test_a_wrong_result_is_not_timed() -> None:
    wrong = Contestant("wrong", random_experts(SHAPE), lambda x, *_: x, 1, 0.05)
    with pytest.raises(WrongProduct, match="wrong is not timed: what it gives for 2 tokens"):
        wrong.checked(activations(2, SHAPE.hidden))


def test_the_command_goes_on_where_it_was(
    tiny: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "experts.json"
    asked: list[int] = []

    def times(found: dict[str, Contestant], x: torch.Tensor, *_: object) -> dict[str, float]:
        asked.append(len(x))
        return {name: 2.0 if name.startswith(OURS) else 5.0 for name in found}

    monkeypatch.setattr(experts, "median_times", times)
    for tokens in (["1"], ["1", "3"]):
        options = ["--experts", "tiny", "--quick", "--json", str(out), "--tokens", *tokens]
        monkeypatch.setattr(sys, "argv", ["kernels", *options])
        kernels.main()
    assert asked == [1, 3]
    result = json.loads(out.read_text())
    assert {(row["m"], row["values"], row["ratio"]) for row in result["rows"]} == {
        (m, values, 2.5) for m in (1, 3) for values in ("bfloat16", "int8")
    }


@pytest.mark.parametrize(
    ("option", "why"),
    [
        (["--tokens", "0"], "give at least 1"),
        (["--patterns", "2:4"], "--patterns: not for --experts, only for linear layers"),
    ],
)
def test_what_experts_have_not_is_refused(
    option: list[str],
    why: str,
    tiny: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels", "--experts", "tiny", *option])
    with pytest.raises(SystemExit):
        kernels.main()
    assert why in capsys.readouterr().err


def test_int8_of_vllm_is_for_amx_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert expert_contestants.VLLM_INT8 not in contestants(random_experts(SHAPE))
