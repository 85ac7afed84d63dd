"""Speculative decoding in vLLM: a 2:4 model drafts, and a dense one decides every token.

Of each draft and number of drafted tokens: what a step takes beside a token of the target alone,
and how many tokens a step yields. The engines take turns, answer by answer: the target with a
draft, the target alone, and dense bfloat16.

    python -m benchmarks.speculation --json OUT
    python -m benchmarks.speculation --model smollm2 --checkpoints DIR --json OUT
    python -m benchmarks.speculation --dense DIR --draft DIR --text FILE --json OUT

Models of random weights show only the first: how often theirs agree says nothing. Drafts of SmolLM2
are pruned by the default method, once, into DIR, and continue texts that they were not calibrated
on. The result is written after each engine, and what it holds already is not measured again.
"""

import argparse
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .cpu.conditions import warn
from .engines.engine import Engine, EngineError
from .engines.identity import identity
from .engines.serving_report import number
from .engines.serving_rows import DENSE, INT8
from .engines.speculation_tables import ARBITRARY
from .engines.speculation_turns import KEY, OUTPUT_TOKENS, Case, Prompts, compare
from .models import SHAPES, random_model, smollm2
from .pruning.checkpoints import Checkpoints, Sparse
from .pruning.commands import ended
from .quality import DEFAULT_METHOD
from .records.result_file import kept_rows
from .serving import MORE, VARIANTS
from .texts import unseen_texts

MADE = {**VARIANTS, **MORE}
"""Checkpoints of a dense one, by their names."""
TARGETS = (DENSE, INT8)
DRAFTS = {"2:4 int4": "int4", "2:4 int8": "int8"}
GIVEN = "2:4"
"""The draft that `--draft` names."""
SEED = 0
DRAFTED = (1, 2, 3, 4)
PROMPT_TOKENS = 64
ANSWERS = 8
"""Of each text, or as often as an arbitrary prompt is answered."""
TOKENS_BETWEEN = 1024
"""From the start of one prompt of a text to that of the next."""


def prompts_of(text: str, encode: Callable[[str], Sequence[int]], answers: int) -> Prompts:
    """Prompts of a text, evenly apart, each followed there by more text.

    Raises:
        ValueError: the text is too short for so many.
    """
    tokens = encode(text)
    apart = min(TOKENS_BETWEEN, len(tokens) // answers)
    if apart < PROMPT_TOKENS:
        raise ValueError(
            f"a text of {len(tokens)} tokens is too short for {answers} prompts of "
            f"{PROMPT_TOKENS}: give a longer one, or fewer --answers"
        )
    return [tokens[i * apart : i * apart + PROMPT_TOKENS] for i in range(answers)]


def arbitrary_prompts(answers: int) -> Prompts:
    """The same prompt for every answer, of words that any vocabulary has."""
    return [[3 + 13 * i for i in range(PROMPT_TOKENS)]] * answers


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the rows as a table, and why cases were refused."""
    console = Console(width=160)
    columns: Sequence[tuple[str, Callable[[Mapping[str, Any]], str]]] = (
        ("target", lambda row: row["target"]),
        ("draft", lambda row: row["draft"]),
        ("drafted", number("drafted", 0)),
        ("text", lambda row: row["text"]),
        ("batch", number("batch", 0)),
        ("step ms", number("step_ms", 1)),
        ("x a token alone", number("step_ratio")),
        ("tokens a step", number("tokens_per_step")),
        ("x target alone", number("ratio")),
        ("x dense", number("dense_ratio")),
        ("tokens/s", number("tokens_per_second", 1)),
        ("resident MiB", number("resident_mib", 0)),
    )
    table = Table(title=title)
    for header, _ in columns:
        table.add_column(
            header, justify="left" if header in ("target", "draft", "text") else "right"
        )
    for row in rows:
        table.add_row(*(shown(row) for _, shown in columns))
    console.print(table)
    for case, why in {
        (row["target"], row["draft"], row["drafted"]): row["refused"]
        for row in rows
        if "refused" in row
    }.items():
        console.print(f"{case} was refused: {why}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", *SHAPES], help="default: tinyllama")
    parser.add_argument("--dense", type=Path, help="target of your own, in place of --model")
    parser.add_argument("--draft", type=Path, help="what drafts for it, in place of --drafts")
    parser.add_argument("--text", type=Path, help="what both continue in pieces")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, metavar="NAME",
        help=f"of {', '.join(map(repr, TARGETS))}; the second is made of the first, beside it "
        "(default: both, of your own the first)",
    )  # fmt: skip
    parser.add_argument(
        "--drafts", nargs="+", choices=DRAFTS, metavar="NAME",
        help=f"of {', '.join(map(repr, DRAFTS))} (default: the first)",
    )  # fmt: skip
    parser.add_argument(
        "--drafted", nargs="+", type=int, default=DRAFTED, metavar="N",
        help="tokens that are drafted before the target decides (default: 1 to 4)",
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--answers", type=int, default=ANSWERS, help="of each text")
    parser.add_argument("--pattern", default="2:4", help="of drafts of SmolLM2 (default: 2:4)")
    parser.add_argument(
        "--checkpoints",
        type=Path,
        metavar="DIR",
        help="pruned models of SmolLM2, made where missing",
    )
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    return parser


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    given = (arguments.dense, arguments.draft, arguments.text)
    if any(given) and not all(given):
        parser.error("--dense, --draft and --text go together: give all of them, or none")
    if any(given) and (arguments.model or arguments.drafts):
        parser.error("--dense and --draft stand in place of --model and --drafts: leave these out")
    for folder in filter(None, (arguments.dense, arguments.draft)):
        if not (folder / "config.json").exists():
            parser.error(f"{folder} is no checkpoint: it has no config.json")
    if (arguments.model == "smollm2") != (arguments.checkpoints is not None):
        parser.error("--model smollm2 and --checkpoints go together: its drafts are pruned there")
    if min(*arguments.drafted, *arguments.batches, arguments.answers) < 1:
        parser.error("--drafted, --batches and --answers are numbers above 0")
    if max(arguments.batches) > arguments.answers:
        parser.error(f"--answers {arguments.answers}: give as many as the largest of --batches")
    dense, texts = _sources(parser, arguments)
    drafts = [GIVEN] if arguments.draft else arguments.drafts or list(DRAFTS)[:1]
    draft = cache(partial(_draft, arguments, dense))
    target = cache(lambda name: MADE[name](dense))
    facts = {
        "model": dense.name,
        "checkpoints": {DENSE: identity(dense)}
        | ({GIVEN: identity(arguments.draft)} if arguments.draft else {}),
        "method": DEFAULT_METHOD if arguments.checkpoints else None,
        "pattern": arguments.pattern if arguments.checkpoints else None,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "mode": "eager",
    }

    def start(case: Case) -> Engine:
        try:
            model, drafting = target(case.target), draft(case.draft) if case.draft else None
        except subprocess.CalledProcessError as error:
            raise EngineError(ended("making a checkpoint", error.returncode)) from error
        return Engine(model, eager=True, speculation=_speculation(drafting, case.drafted))

    cases = [
        Case(target, draft, drafted)
        for target in arguments.targets or TARGETS[: 1 if arguments.dense else None]
        for draft in drafts
        for drafted in arguments.drafted
    ]
    warn()
    with kept_rows(parser, arguments.json, facts, KEY) as rows:
        compare(cases, texts, arguments.batches, start, rows)
        show(rows.all(), dense.name)


def _sources(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace
) -> tuple[Path, Mapping[str, Prompts]]:
    """The dense model, and prompts by text."""
    if arguments.dense is None and arguments.model != "smollm2":
        model = random_model(arguments.model or "tinyllama")
        return model, {ARBITRARY: arbitrary_prompts(arguments.answers)}
    from transformers import AutoTokenizer

    dense = arguments.dense or smollm2()
    files = {arguments.text.stem: arguments.text} if arguments.text else unseen_texts()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    try:
        return dense, {
            name: prompts_of(file.read_text(encoding="utf-8"), encode, arguments.answers)
            for name, file in files.items()
        }
    except (OSError, ValueError) as error:
        parser.error(str(error))


def _speculation(draft: Path | None, drafted: int) -> Mapping[str, Any] | None:
    """vLLM's ``--speculative-config`` for a draft."""
    if draft is None:
        return None
    return {"method": "draft_model", "model": str(draft), "num_speculative_tokens": drafted}


def _draft(arguments: argparse.Namespace, dense: Path, name: str) -> Path:
    """The checkpoint of a draft."""
    if name == GIVEN:
        return Path(arguments.draft)
    if arguments.checkpoints is None:
        return MADE[name](dense)
    key = Sparse(DEFAULT_METHOD, arguments.pattern, "default", DRAFTS[name], SEED)
    return Checkpoints(arguments.checkpoints, dense).baked(key)[0]


if __name__ == "__main__":
    main()
