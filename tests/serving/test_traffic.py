"""A float32 server in mixed traffic: every answer is the one that the request gets alone."""

import asyncio
from collections.abc import Iterator

import pytest

from benchmarks.server import Server, serve
from benchmarks.soak import IDLE, settled_metrics
from benchmarks.traffic import Question, Traffic
from tests.serving.checkpoints import Twins
from tests.serving.scoring import ARGUMENTS, text_tokens

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def server(half: Twins) -> Iterator[Server]:
    with serve(half.sparse, *ARGUMENTS, "--dtype", "float32") as started:
        yield started


def test_traffic_changes_no_answer(server: Server) -> None:
    """Streams at the same time, hung up, long and malformed ones: `make soak` in short."""
    text = text_tokens(server.model, 480)
    asked = [Question(tuple(text[i * 23 : i * 23 + 6 + 9 * i]), 6) for i in range(6)]
    asked.append(Question(tuple(text), 6))
    target = (server.base_url, str(server.model), 512, asked)
    alone = asyncio.run(Traffic(*target, {}).ask_singly())
    tally = asyncio.run(Traffic(*target, alone).run(clients=6, seconds=6))
    assert (tally.errors, tally.wrong) == ([], [])
    assert tally.compared == tally.completed > 0
    metrics = settled_metrics(server.base_url)
    assert {name: metrics[name] for name in IDLE} == dict.fromkeys(IDLE, 0)


def test_the_log_says_that_no_kernel_serves(server: Server) -> None:
    line = server.backend_line()
    assert "backend reference (pytorch) serves 60 sparse linear layers" in line
    assert server.log().count("sparse layers run on the reference backend") == 1
