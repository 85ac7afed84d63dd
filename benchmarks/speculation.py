"""Speculative decoding in vLLM: a sparse model drafts, and the dense one decides every token.

Of each number of drafted tokens: what a step takes beside a token of the dense model alone, and how
many tokens a step yields. The engines take turns, answer by answer.

    python -m benchmarks.speculation --checkpoints DIR --pattern 32:64 --json OUT
    python -m benchmarks.speculation --dense DIR --draft DIR --text FILE --json OUT

The first is SmolLM2, whose draft is pruned by the default method with int4 values, once, into DIR,
and continues texts that it was not calibrated on. The result is written after each engine, and what
it holds already is not measured again.
"""

import argparse
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from permllm_vllm.checkpoint.pattern import SUPPORTED

from .cpu.conditions import warn
from .engines.engine import Engine, EngineError
from .engines.identity import identity
from .engines.serving_report import number
from .engines.serving_rows import DENSE
from .engines.speculation_turns import KEY, OUTPUT_TOKENS, Case, Prompts, compare
from .models import smollm2
from .pruning.checkpoints import Checkpoints, Sparse
from .pruning.commands import ended
from .quality import DEFAULT_METHOD
from .records.result_file import kept_rows
from .texts import unseen_texts

VALUES, SEED = "int4", 0
"""Of the draft of SmolLM2."""
DRAFTED = (1, 2, 3, 4)
PROMPT_TOKENS = 64
ANSWERS = 8
"""Of each text."""
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
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="the draft of SmolLM2, made where missing"
    )
    parser.add_argument(
        "--pattern", choices=SUPPORTED, default="2:4", help="of that draft (default: 2:4)"
    )
    parser.add_argument("--dense", type=Path, help="target of your own, in place of SmolLM2")
    parser.add_argument("--draft", type=Path, help="what drafts for it")
    parser.add_argument("--text", type=Path, help="what both continue in pieces")
    parser.add_argument(
        "--drafted", nargs="+", type=int, default=DRAFTED, metavar="N",
        help="tokens that are drafted before the target decides (default: 1 to 4)",
    )  # fmt: skip
    parser.add_argument("--batches", nargs="+", type=int, default=[1], metavar="N")
    parser.add_argument("--answers", type=int, default=ANSWERS, help="of each text")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    return parser


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the command where they do not go together."""
    arguments = parser.parse_args()
    given = (arguments.dense, arguments.draft, arguments.text)
    if any(given) and not all(given):
        parser.error("--dense, --draft and --text go together: give all of them, or none")
    if any(given) == (arguments.checkpoints is not None):
        parser.error("give --checkpoints, or --dense, --draft and --text in its place")
    for folder in filter(None, (arguments.dense, arguments.draft)):
        if not (folder / "config.json").exists():
            parser.error(f"{folder} is no checkpoint: it has no config.json")
    if min(*arguments.drafted, *arguments.batches, arguments.answers) < 1:
        parser.error("--drafted, --batches and --answers are numbers above 0")
    if max(arguments.batches) > arguments.answers:
        parser.error(f"--answers {arguments.answers}: give as many as the largest of --batches")
    return arguments


def main() -> None:
    parser = _parser()
    arguments = _checked(parser)
    dense = arguments.dense or smollm2()
    texts = _texts(parser, arguments, dense)
    name = "sparse" if arguments.dense else f"{arguments.pattern} {VALUES}"
    draft = cache(partial(_draft, arguments, dense))
    facts = {
        "model": dense.name,
        "checkpoints": {DENSE: identity(dense)}
        | ({name: identity(arguments.draft)} if arguments.draft else {}),
        "method": DEFAULT_METHOD if arguments.checkpoints else None,
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": OUTPUT_TOKENS,
        "mode": "eager",
    }

    def start(case: Case) -> Engine:
        try:
            drafting = draft() if case.draft else None
        except subprocess.CalledProcessError as error:
            raise EngineError(ended("making a checkpoint", error.returncode)) from error
        return Engine(dense, eager=True, speculation=_speculation(drafting, case.drafted))

    cases = [Case(DENSE, name, drafted) for drafted in arguments.drafted]
    warn()
    with kept_rows(parser, arguments.json, facts, KEY) as rows:
        compare(cases, texts, arguments.batches, start, rows)
        show(rows.all(), dense.name)


def _texts(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, dense: Path
) -> Mapping[str, Prompts]:
    """Prompts by the name of their text."""
    from transformers import AutoTokenizer

    files = {arguments.text.stem: arguments.text} if arguments.text else unseen_texts()
    tokenizer = AutoTokenizer.from_pretrained(dense)
    encode = partial(tokenizer.encode, add_special_tokens=False, verbose=False)
    try:
        return {
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


def _draft(arguments: argparse.Namespace, dense: Path) -> Path:
    """The checkpoint of the draft."""
    if arguments.draft:
        return Path(arguments.draft)
    key = Sparse(DEFAULT_METHOD, arguments.pattern, "default", VALUES, SEED)
    return Checkpoints(arguments.checkpoints, dense).baked(key)[0]


if __name__ == "__main__":
    main()
