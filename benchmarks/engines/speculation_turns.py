"""Engines with a draft, each in turn with its target alone and with dense bfloat16."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from statistics import harmonic_mean, median
from typing import Any, Protocol

from benchmarks.cpu.conditions import conditions
from benchmarks.engines.engine import Answers, EngineError
from benchmarks.engines.serving_rows import DENSE
from benchmarks.records.rows import Rows

KEY = ("target", "draft", "drafted", "text", "batch")
OUTPUT_TOKENS = 64
"""Of every answer."""


class Answering(Protocol):
    """An engine that takes turns."""

    def answers_to(self, prompts: Sequence[Sequence[int]], output: int) -> Answers:
        """Times of answers; raises EngineError."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a row says of the engine itself; raises EngineError."""
        ...

    def close(self) -> None:
        """End it."""
        ...


@dataclass(frozen=True)
class Case:
    """A target, what drafts for it, and how many tokens are drafted before it decides.

    Without a draft it is the target alone.
    """

    target: str
    draft: str | None = None
    drafted: int = 0


Start = Callable[[Case], Answering]
Prompts = Sequence[Sequence[int]]


def compare(
    cases: Sequence[Case],
    texts: Mapping[str, Prompts],
    batches: Sequence[int],
    start: Start,
    rows: Rows,
) -> None:
    """Measure what the rows lack, an engine with a draft after the other.

    Args:
        cases: with drafts; those of one target beside each other, as it stays up for all of them.
        texts: prompts by the name of their text, of one length, as many as the largest batch.
        batches: sequences that decode together.
        start: gives an engine; raises EngineError.
        rows: to which those of each case are added.
    """
    for target in dict.fromkeys(case.target for case in cases):
        lacking = [
            case for case in cases if case.target == target and _lacks(rows, case, texts, batches)
        ]
        if not lacking:
            continue
        with ExitStack() as alone:
            engines: dict[str, Answering] = {}
            for case in lacking:
                try:
                    for name in dict.fromkeys((DENSE, target)):
                        if name not in engines:
                            engines[name] = alone.enter_context(closing(start(Case(name))))
                    with closing(start(case)) as drafting:
                        rows.update(_measured(case, texts, batches, engines, drafting))
                except EngineError as error:
                    rows.update(
                        {**_key(case, text, batch), "refused": str(error)}
                        for text in texts
                        for batch in batches
                    )


def _lacks(rows: Rows, case: Case, texts: Mapping[str, Prompts], batches: Sequence[int]) -> bool:
    keys = (_key(case, text, batch) for text in texts for batch in batches)
    return any(tuple(key[name] for name in KEY) not in rows for key in keys)


def _key(case: Case, text: str, batch: int) -> dict[str, Any]:
    values = (case.target, case.draft, case.drafted, text, batch)
    return dict(zip(KEY, values, strict=True))


def _measured(
    case: Case,
    texts: Mapping[str, Prompts],
    batches: Sequence[int],
    alone: Mapping[str, Answering],
    drafting: Answering,
) -> Iterator[dict[str, Any]]:
    """A row for each text and batch; the first answer of each engine warms it up."""
    engines = {**alone, "drafting": drafting}
    for engine in engines.values():
        engine.answers_to(next(iter(texts.values()))[:1], OUTPUT_TOKENS)
    for text, prompts in texts.items():
        for batch in batches:
            found: dict[str, list[Answers]] = {name: [] for name in engines}
            for group in _groups(prompts, batch):
                for name, engine in engines.items():
                    found[name].append(engine.answers_to(group, OUTPUT_TOKENS))
            yield {
                **_key(case, text, batch),
                "answers": len(prompts) // batch * batch,
                **_times(found.pop("drafting"), found[case.target], found[DENSE], batch),
                **_of_engines(drafting, alone[case.target]),
                **conditions(),
            }


def _groups(prompts: Prompts, batch: int) -> Iterator[Prompts]:
    for first in range(0, len(prompts) - batch + 1, batch):
        yield prompts[first : first + batch]


def _times(
    drafting: Sequence[Answers], alone: Sequence[Answers], dense: Sequence[Answers], batch: int
) -> dict[str, float]:
    """What a step takes, what it yields for each sequence, and what follows of the two."""
    step, token, dense_token = (_step_ms(answers, batch) for answers in (drafting, alone, dense))
    yields = harmonic_mean([one.tokens_per_step for one in drafting])  # answers of one length
    return {
        "step_ms": step,
        "alone_ms": token,
        "dense_ms": dense_token,
        "step_ratio": step / token,
        "tokens_per_step": yields,
        "ratio": yields * token / step,
        "dense_ratio": yields * dense_token / step,
        "tokens_per_second": 1e3 * batch * yields / step,
    }


def _step_ms(answers: Sequence[Answers], batch: int) -> float:
    """Milliseconds of a step: the median of the answers."""
    steps = (one.tokens_per_step / one.decode_tokens_per_second for one in answers)
    return 1e3 * batch * median(steps)


def _of_engines(drafting: Answering, alone: Answering) -> dict[str, Any]:
    facts, of_target = drafting.facts(), alone.facts()
    names = ("load_seconds", "threads", "resident_mib", "peak_mib")
    own = {name: facts[name] for name in names if name in facts}
    return {**own, "alone_resident_mib": of_target["resident_mib"]}
