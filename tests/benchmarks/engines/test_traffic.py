"""Traffic against a pretended server on loopback: each way to fail is counted, and only that."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer

from benchmarks.engines.traffic import BrokenStreamError, Question, Tally, Traffic, stream

QUESTION = Question((5, 6, 7), 4)
TOKENS = (11, 12, 13, 14)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def piece(tokens: list[int]) -> bytes:
    return b"data: " + json.dumps({"choices": [{"token_ids": tokens}]}).encode() + b"\n\n"


WHOLE = [piece([token]) for token in TOKENS] + [b"data: [DONE]\n\n"]


def answering(pieces: list[bytes]) -> Handler:
    """Refuses what is malformed and streams the pieces to everything else."""

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            body = json.loads(await request.read())
            good = body["model"] == "m" and body["prompt"] == list(QUESTION.prompt)
            good = good and body["max_tokens"] == QUESTION.max_tokens and body["temperature"] == 0
        except (ValueError, KeyError, TypeError):
            good = False
        if not good:
            return web.Response(status=400, text="no")
        response = web.StreamResponse()
        await response.prepare(request)
        for part in pieces:
            await response.write(part)
        return response

    return handler


def refusing(status: int) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, text="why")

    return handler


async def with_server(handler: Handler, use: Callable[[str], Awaitable[Any]]) -> Any:
    application = web.Application()
    for path in ("completions", "chat/completions"):
        application.router.add_post(f"/v1/{path}", handler)
    async with TestServer(application) as server:
        return await use(str(server.make_url("/v1")))


def send(
    handler: Handler, enough: Callable[[Tally], int], expected: tuple[int, ...] | None = TOKENS
) -> Tally:
    """Send until there is enough: a slow machine must not make a test fail."""
    answers = {} if expected is None else {QUESTION: expected}

    async def use(base_url: str) -> Tally:
        traffic = Traffic(base_url, "m", 16, [QUESTION], answers)
        while not enough(traffic.tally):
            await traffic.run(clients=3, seconds=0.02)
        return traffic.tally

    return asyncio.run(with_server(handler, use))


def test_whole_answers_are_counted_and_compared() -> None:
    tally = send(answering(WHOLE), lambda t: min(t.completed, t.cancelled, t.refused))
    assert (tally.errors, tally.wrong) == ([], [])
    assert tally.compared == tally.completed == len(tally.whole) == len(tally.first_token)
    assert 4 * tally.completed <= tally.tokens <= 4 * tally.requests


def test_a_wrong_answer_is_noticed() -> None:
    tally = send(answering(WHOLE), lambda t: t.completed, expected=(11, 12, 13, 15))
    assert len(tally.wrong) == tally.completed
    assert tally.errors == []


def test_without_expectations_nothing_is_compared() -> None:
    tally = send(answering(WHOLE), lambda t: t.completed, expected=None)
    assert (tally.compared, tally.wrong) == (0, [])


@pytest.mark.parametrize("status", [200, 302, 500, 503])
def test_a_malformed_request_must_be_refused(status: int) -> None:
    tally = send(refusing(status), lambda t: any(e.startswith("malformed") for e in t.errors))
    assert tally.completed == 0


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (WHOLE[:-1], "4 of 4 tokens came, no [DONE]"),
        (WHOLE[1:], "3 of 4 tokens came"),
        ([*WHOLE[:2], *WHOLE[1:]], "5 of 4 tokens came"),
        ([WHOLE[0], b'data: {"error": {"message": "engine dead"}}\n\n'], "engine dead"),
        ([b"data: {\n\n"], "a piece that is none"),
        ([], "0 of 4 tokens came"),
    ],
)
def test_a_broken_stream_is_an_error(pieces: list[bytes], message: str) -> None:
    async def use(base_url: str) -> None:
        async with ClientSession(base_url + "/") as session:
            await stream(session, "m", QUESTION)

    with pytest.raises(BrokenStreamError) as error:
        asyncio.run(with_server(answering(pieces), use))
    assert message in str(error.value)


def test_a_server_that_is_down_is_an_error() -> None:
    async def use() -> Tally:
        return await Traffic("http://127.0.0.1:9/v1", "m", 16, [QUESTION], {}).run(2, 0.1)

    tally = asyncio.run(use())
    assert tally.completed == tally.cancelled == tally.refused == 0
    assert tally.errors


def test_questions_are_asked_singly() -> None:
    async def use(base_url: str) -> dict[Question, tuple[int, ...]]:
        return await Traffic(base_url, "m", 16, [QUESTION], {}).ask_singly()

    assert asyncio.run(with_server(answering(WHOLE), use)) == {QUESTION: TOKENS}
