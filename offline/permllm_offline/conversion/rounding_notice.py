"""What is said beside weights that were rounded to integers after the papers were written."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permllm_offline.conversion.report import FinishedRounding
from permllm_offline.report import papers
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import read_json

_HEADER = re.compile(rb"\A---\r?\n.*?\r?\n---[ \t]*(\r?\n|\Z)", re.DOTALL)
"""The metadata of a model card, which must stay its beginning."""


def noted_papers(
    directory: Path, rounding: FinishedRounding, dtype: str
) -> dict[str, Callable[[], bytes]]:
    """Carry the papers of a source over with a notice; what they say else is of the source.

    The model card has it at its top, and so have report and page of a prune; its recipe is still
    that of the prune. Files of other tools by these names stay as they are.

    Args:
        directory: of the source.
        rounding: of the values, finished when a paper is asked for.
        dtype: of the values before.
    """

    def card() -> bytes:
        return _on_card((directory / papers.CARD).read_bytes(), _notice(rounding, dtype))

    def page() -> bytes:
        text = _notice(rounding, dtype).replace("`", "").encode()
        found = (directory / papers.PAGE).read_bytes()
        return found.replace(b"</h1>", b"</h1>\n<p>" + text + b"</p>", 1)

    def of_prune() -> bytes:
        return _in_report(report or {}, rounding, _notice(rounding, dtype))

    report = _prune_report(directory / papers.REPORT)
    carried: dict[str, Callable[[], bytes]] = {papers.CARD: card}
    if report is not None:
        carried |= {papers.REPORT: of_prune, papers.PAGE: page}
    return {name: write for name, write in carried.items() if (directory / name).is_file()}


def _notice(rounding: FinishedRounding, dtype: str) -> str:
    return (
        f"The {dtype} values of {len(rounding.errors)} sparse linear layers were rounded to "
        f"{rounding.values} by `permllm-offline convert --values {rounding.values}`, "
        f"{rounding.how}. Relative error of a layer's {rounding.error_of}: "
        f"{max(rounding.errors.values()):.2%} at most. All else here was written before that and "
        "is about the values before."
    )


def _prune_report(path: Path) -> dict[str, Any] | None:
    try:
        report = read_json(path)
    except CheckpointError:
        return None
    return report if {"recipe", "layers"} <= report.keys() else None


def _on_card(card: bytes, text: str) -> bytes:
    header = _HEADER.match(card)
    end = 0 if header is None else header.end()
    quoted = textwrap.fill(text, initial_indent="> ", subsequent_indent="> ", width=100)
    return card[:end] + f"\n{quoted}\n\n".encode() + card[end:].lstrip()


def _in_report(report: dict[str, Any], rounding: FinishedRounding, text: str) -> bytes:
    """Say it first, and write each layer's ``rounding_error``, which the prune left open."""
    layers = [
        _without_old_name(layer) | {"rounding_error": rounding.errors[layer["name"]]}
        if isinstance(layer, dict) and layer.get("name") in rounding.errors
        else layer
        for layer in report["layers"]
    ]
    noted = {"rounded_afterwards": text, **report, "layers": layers}
    return (json.dumps(noted, indent=2) + "\n").encode()


def _without_old_name(layer: dict[str, Any]) -> dict[str, Any]:
    """A layer of a report without the error's first name, by which older ones have it."""
    return {name: value for name, value in layer.items() if name != "int8_error"}
