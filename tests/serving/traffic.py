"""`make soak` in short: a few seconds of mixed traffic against a server that a test has started."""

import asyncio

from benchmarks.engines.server import Server
from benchmarks.engines.traffic import Question, Tally, Traffic
from benchmarks.soak import IDLE, settled_metrics
from tests.serving.scoring import text_tokens


def mixed_traffic(server: Server, *, compare: bool) -> Tally:
    """Send streams at the same time, hung up, long and malformed ones, until the server is idle.

    With `compare`, every question is asked alone before, and whole answers are held against that.
    """
    text = text_tokens(server.model, 480)
    asked = [Question(tuple(text[i * 23 : i * 23 + 6 + 9 * i]), 6) for i in range(6)]
    asked.append(Question(tuple(text), 6))
    target = (server.base_url, str(server.model), 512, asked)
    alone = asyncio.run(Traffic(*target, {}).ask_singly()) if compare else {}
    tally = asyncio.run(Traffic(*target, alone).run(clients=6, seconds=4))
    metrics = settled_metrics(server.base_url)
    assert {name: metrics[name] for name in IDLE} == dict.fromkeys(IDLE, 0)
    return tally
