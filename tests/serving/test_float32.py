"""In float32 rounding cannot hide a mistake: sparse and dense servers give the same tokens."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch

from benchmarks.server import Server
from benchmarks.soak import IDLE, settled_metrics
from benchmarks.traffic import Question, Traffic
from tests.serving.checkpoints import Twins
from tests.serving.scoring import greedy, prompt_log_probabilities, start, text_tokens

pytestmark = pytest.mark.serving


class Servers(NamedTuple):
    sparse: Server
    dense: Server


@pytest.fixture(scope="module")
def servers(twins: Twins) -> Iterator[Servers]:
    float32 = ("--dtype", "float32")
    with ExitStack() as stack:
        sparse = (twins.sparse, (*float32, "--quantization", "permllm"))
        yield Servers(*start(stack, sparse, (twins.dense, float32)))


def test_greedy_tokens_are_equal(servers: Servers) -> None:
    text = text_tokens(servers.dense.model, 200)
    for begin, end in ((0, 5), (30, 62), (90, 200)):
        sparse, sparse_log_probabilities = greedy(servers.sparse, text[begin:end], 16)
        dense, dense_log_probabilities = greedy(servers.dense, text[begin:end], 16)
        assert sparse == dense
        assert (sparse_log_probabilities - dense_log_probabilities).abs().max() < 1e-3


def test_log_probabilities_of_a_text_are_equal(servers: Servers) -> None:
    text = text_tokens(servers.dense.model, 384)
    difference = prompt_log_probabilities(servers.sparse, text) - prompt_log_probabilities(
        servers.dense, text
    )
    assert difference.abs().max() < 1e-3
    assert torch.isfinite(difference).all()


def test_traffic_changes_no_answer(servers: Servers) -> None:
    """Streams at the same time, hung up, long and malformed ones: `make soak` in short."""
    text = text_tokens(servers.dense.model, 480)
    asked = [Question(tuple(text[i * 23 : i * 23 + 6 + 9 * i]), 6) for i in range(6)]
    asked.append(Question(tuple(text), 6))
    server = (servers.sparse.base_url, str(servers.sparse.model), 512, asked)
    alone = asyncio.run(Traffic(*server, {}).ask_singly())
    tally = asyncio.run(Traffic(*server, alone).run(clients=6, seconds=6))
    assert (tally.errors, tally.wrong) == ([], [])
    assert tally.compared == tally.completed > 0
    metrics = settled_metrics(servers.sparse.base_url)
    assert {name: metrics[name] for name in IDLE} == dict.fromkeys(IDLE, 0)


def test_the_log_says_that_no_kernel_serves(servers: Servers) -> None:
    assert "backend reference (pytorch) serves 120 sparse linear layers" in (
        servers.sparse.backend_line()
    )
    assert servers.sparse.log().count("sparse layers run on the reference backend") == 1
    assert not servers.dense.backend_line()
