"""Requests as users send them to a server: streamed, cut off by the client, long, and malformed.

Nothing here stops at the first error: a `Tally` counts what came back.
"""

import asyncio
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

COMPLETE, CANCEL, MALFORMED = "complete", "cancel", "malformed"
WEIGHTS = {COMPLETE: 14, CANCEL: 3, MALFORMED: 3}


class BrokenStreamError(RuntimeError):
    """A streamed answer was refused, ended too early or made no sense."""


@dataclass(frozen=True)
class Question:
    """A prompt, and how many tokens are asked for."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Answer:
    """A whole streamed answer; times in seconds from the request on."""

    tokens: tuple[int, ...]
    first_token: float
    whole: float


@dataclass
class Tally:
    """What came back. `wrong` are whole answers that differ from the expected ones."""

    completed: int = 0
    cancelled: int = 0
    refused: int = 0
    compared: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)

    @property
    def requests(self) -> int:
        """Everything that was sent."""
        return self.completed + self.cancelled + self.refused + len(self.errors)


def malformed_requests(model: str, context: int) -> list[tuple[str, bytes]]:
    """Path and body of requests that a server refuses with a status of 400 to 499."""
    good: dict[str, Any] = {"model": model, "prompt": [1, 2, 3], "max_tokens": 4}
    bad: list[Mapping[str, Any]] = [
        {"model": "no-such-model"},
        {"max_tokens": -1},
        {"max_tokens": "many"},
        {"temperature": "hot"},
        {"temperature": -1},
        {"top_p": 7},
        {"n": 0},
        {"logprobs": -5},
        {"prompt": [1] * (context + 1)},
        {"prompt": [1 << 40]},
        {"prompt": {"text": "hello"}},
        {"stream": "perhaps"},
    ]
    bodies = [b"", b"{", b"[]", b'"text"', b"\xff\xfe", b"null"]
    bodies += [json.dumps({**good, **entries}).encode() for entries in bad]
    requests = [("completions", body) for body in bodies]
    no_messages = json.dumps({"model": model, "messages": "none"}).encode()
    return [*requests, ("chat/completions", no_messages), ("no-such-route", b"{}")]


async def stream(
    session: aiohttp.ClientSession, model: str, question: Question, *, stop_after: int | None = None
) -> Answer:
    """Stream a greedy answer; with `stop_after`, hang up after so many pieces of it.

    Raises:
        BrokenStreamError: a status other than 200, an error inside the stream, or an end before
            all tokens came.
    """
    body = {
        "model": model,
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    start = time.perf_counter()
    tokens: list[int] = []
    first, pieces, done = 0.0, 0, False
    async with session.post("completions", json=body) as response:
        if response.status != 200:
            raise BrokenStreamError(f"status {response.status}: {(await response.text())[:300]}")
        if stop_after == 0:
            return Answer((), 0.0, time.perf_counter() - start)
        async for line in response.content:
            text = line.decode().strip()
            if not text:
                continue
            if text == "data: [DONE]":
                done = True
                continue
            tokens += _token_ids(text)
            first = first or time.perf_counter() - start
            pieces += 1
            if pieces == stop_after:
                return Answer(tuple(tokens), first, time.perf_counter() - start)
    if not done or len(tokens) != question.max_tokens:
        end = "" if done else ", no [DONE]"
        raise BrokenStreamError(f"{len(tokens)} of {question.max_tokens} tokens came{end}")
    return Answer(tuple(tokens), first, time.perf_counter() - start)


def _token_ids(line: str) -> list[int]:
    try:
        piece = json.loads(line.removeprefix("data: "))
        return piece["choices"][0]["token_ids"] or []
    except (ValueError, LookupError, TypeError) as error:
        raise BrokenStreamError(f"a piece that is none: {line[:300]}") from error


class Traffic:
    """Clients that send requests at the same time to one server until told to stop.

    Args:
        base_url: of the server, with `/v1`.
        model: the name it serves.
        context: the longest prompt that it takes, in tokens.
        questions: what is asked.
        expected: tokens of the single-request answer to every question that is compared.
        seed: of what is sent when.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        context: int,
        questions: Sequence[Question],
        expected: Mapping[Question, tuple[int, ...]],
        seed: int = 0,
    ) -> None:
        self.tally = Tally()
        self._base_url, self._model = base_url.rstrip("/") + "/", model
        self._malformed = malformed_requests(model, context)
        self._questions, self._expected = questions, expected
        self._choice = random.Random(seed)

    async def run(self, clients: int, seconds: float) -> Tally:
        """Send for `seconds`, then wait for what is under way; return the tally."""
        deadline = time.monotonic() + seconds
        async with self._session() as session:
            await asyncio.gather(*(self._client(session, deadline) for _ in range(clients)))
        return self.tally

    async def ask_singly(self) -> dict[Question, tuple[int, ...]]:
        """Ask every question alone, one after the other; return the tokens of the answers."""
        async with self._session() as session:
            return {
                question: (await stream(session, self._model, question)).tokens
                for question in self._questions
            }

    def _session(self) -> aiohttp.ClientSession:
        timeout = aiohttp.ClientTimeout(total=300)
        return aiohttp.ClientSession(self._base_url, timeout=timeout)

    async def _client(self, session: aiohttp.ClientSession, deadline: float) -> None:
        kinds, weights = list(WEIGHTS), list(WEIGHTS.values())
        while time.monotonic() < deadline:
            kind = self._choice.choices(kinds, weights)[0]
            try:
                if kind == MALFORMED:
                    await self._send_malformed(session)
                else:
                    await self._ask(session, cancel=kind == CANCEL)
            except (BrokenStreamError, aiohttp.ClientError, TimeoutError) as error:
                self.tally.errors.append(f"{kind}: {type(error).__name__}: {error}"[:400])

    async def _send_malformed(self, session: aiohttp.ClientSession) -> None:
        path, body = self._choice.choice(self._malformed)
        headers = {"Content-Type": "application/json"}
        async with session.post(path, data=body, headers=headers) as response:
            text = await response.text()
            if not 400 <= response.status < 500:
                raise BrokenStreamError(
                    f"status {response.status} for {body[:100]!r}: {text[:200]}"
                )
        self.tally.refused += 1

    async def _ask(self, session: aiohttp.ClientSession, *, cancel: bool) -> None:
        question = self._choice.choice(self._questions)
        stop_after = self._choice.randrange(question.max_tokens) if cancel else None
        answer = await stream(session, self._model, question, stop_after=stop_after)
        self.tally.tokens += len(answer.tokens)
        if cancel:
            self.tally.cancelled += 1
            return
        self.tally.completed += 1
        self.tally.first_token.append(answer.first_token)
        self.tally.whole.append(answer.whole)
        if question in self._expected:
            self.tally.compared += 1
            if answer.tokens != self._expected[question]:
                self.tally.wrong.append(
                    f"{len(question.prompt)} tokens from {question.prompt[:4]}: {answer.tokens}, "
                    f"alone {self._expected[question]}"
                )
