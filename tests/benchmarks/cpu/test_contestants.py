"""Every contestant multiplies by its weight, and one that does not is not timed."""

import gc
from collections.abc import Callable

import pytest
import torch

from benchmarks.cpu import contestants
from benchmarks.cpu.contestants import (
    Contestant,
    dense_contestants,
    median_times,
    peer_makers,
    sparse_contestant,
)
from benchmarks.cpu.products import WrongProduct, activations
from benchmarks.shapes import random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend

N, K = 192, 256
LARGEST = {"vllm int8": 0.04}
"""0.031 on a CPU without VNNI."""


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(contestants, "POOL_BYTES", 4 * N * K)


def plain_error(y, x, dense):
    exact = x.double() @ dense.double().t()
    return float((y.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", ["torch", "vllm", "vllm int8"])
def test_dense_contestants_multiply_by_their_weight(name):
    make = peer_makers(int8=True).get(name)
    if make is None:
        pytest.skip("vLLM is not installed")
    dense = random_layer(N, K).dense
    with torch.inference_mode():
        calls = [make(dense) for _ in range(4)]
        gc.collect()
        # What was freed is written over.
        filled = [torch.full((size,), torch.nan) for size in (N, N, N, N, N * K, N * K)]
        for m in (1, 4, 40):
            x = activations(m, K)
            for call in calls:
                assert plain_error(call(x), x, dense) < LARGEST.get(name, 0.004)
        del filled
        found = dense_contestants({name: make}, dense)
        assert median_times(found, activations(4, K), threads=1, rounds=1)[name] > 0


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
def test_sparse_contestants_multiply_by_their_weight(values):
    drawn = random_layer(N, K)
    layer = drawn if values == "bfloat16" else to_int8(drawn)
    with torch.inference_mode():
        contestant = sparse_contestant(values, layer, CpuBackend())
        for m in (1, 4, 40):
            x = activations(m, K)
            assert contestant.checked(x) < 0.015
            y = contestants.sparse_linear(layer, CpuBackend())(x)
            assert plain_error(y, x, layer.dense) < 0.015


@pytest.mark.parametrize("wrong", [1.02, torch.nan], ids=["other values", "no number"])
@pytest.mark.parametrize("since", [1, 8], ids=["of one token", "of many tokens"])
def test_a_contestant_that_multiplies_by_something_else_is_not_timed(wrong, since):
    dense = random_layer(N, K).dense

    def make(dense):
        return lambda x: (x.float() @ dense.float().t()) * (wrong if len(x) >= since else 1)

    def time_it():
        found = dense_contestants({"crooked": make}, dense)
        median_times(found, activations(8, K), threads=1, rounds=1)

    said = "0.02" if wrong == 1.02 else "nan"
    with pytest.raises(
        WrongProduct, match=rf"crooked is not timed: .* {since} tokens is {said}.*0.01"
    ):
        time_it()


def test_every_copy_is_looked_at():
    dense = random_layer(N, K).dense
    weights = iter([dense, dense, dense + 1, dense])

    def make():
        weight = next(weights)
        return lambda x: x @ weight.t()

    contestant = Contestant("copies", N * K, make, dense, limit=0.01)
    with pytest.raises(WrongProduct, match="copies is not timed"):
        contestant.warm()


class Watched:
    """Notes its turns; each takes so many seconds."""

    def __init__(self, name: str, called: list[str], seconds: float) -> None:
        self.name, self.called, self.seconds = name, called, seconds

    def checked(self, x: torch.Tensor) -> float:
        return 0.0

    def time(self, x: torch.Tensor, clock: Callable[[], float]) -> float:
        self.called.append(self.name)
        return self.seconds


def test_every_round_has_an_order_of_its_own() -> None:
    called: list[str] = []
    watched = {name: Watched(name, called, 1e-3) for name in "abcd"}
    times = median_times(watched, torch.zeros(1, 1), threads=1, rounds=9)
    rounds = ["".join(called[i : i + 4]) for i in range(0, len(called), 4)]
    assert list(times) == list("abcd")
    assert {"".join(sorted(one)) for one in rounds} == {"abcd"}
    assert len(rounds) == 10
    assert len(set(rounds)) > 5


def test_slow_ones_take_turns_in_some_rounds() -> None:
    called: list[str] = []
    watched = {"slow": Watched("slow", called, 0.9), "fast": Watched("fast", called, 0.1)}
    times = median_times(watched, torch.zeros(1, 1), threads=1, rounds=9)
    assert times == pytest.approx({"slow": 0.9e6, "fast": 0.1e6})
    assert [called.count(name) for name in watched] == [4, 10]
    assert "slow" in called[-2:]
    one_round = median_times(dict(watched), torch.zeros(1, 1), threads=1, rounds=1)
    assert set(one_round) == set(watched)
