"""What a whole prune of SmolLM2-135M takes, method by method and part by part."""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.models import smollm2
from benchmarks.pruning.checkpoints import (
    SEQUENCE_LENGTH,
    Checkpoints,
    processor_time,
    times_since,
)
from benchmarks.pruning.named_method import NamedMethod
from benchmarks.pruning.prune_parts import REFERENCE, parts
from benchmarks.texts import sotu
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.run.costs import peak_bytes
from permllm_offline.run.steps import Work

METHODS = (
    REFERENCE,
    "wanda+cp",
    "magnitude",
    "wanda",
    "ria",
    "wanda+cp-lsa",
    "ria+cp-lsa",
    "wanda+cp-global",
    "ria+cp-global",
    "sparsegpt",
    "wanda+cp/obs+blockwise",
    "permllm-wanda",
    "permllm-ria",
    "permllm-best",
)
"""METHOD or METHOD/RECONSTRUCTION, each with its defaults; every one of ``methods.METHODS``."""

QUICK_METHODS = (REFERENCE, "permllm-wanda", "permllm-best")

QUICK = {
    "num_samples": 8,
    "sequence_length": 32,
    "evaluation_windows": 2,
    "learning": {"steps": 1, "windows_per_step": 1, "validation_windows": 1},
    "blockwise": {"steps": 1, "windows_per_step": 1, "validation_windows": 1},
    "distillation": {"steps": 1, "self_windows": 1, "validation_windows": 1},
}
"""Recipe entries of a run that only shows whether it runs."""


class PipelineCost:
    """Prunes each method in a process of its own, as a user does.

    Args:
        directory: for the checkpoints; where and how ``benchmarks.accuracy`` looks for them.
        quick: few and short windows and steps.
    """

    def __init__(self, directory: Path, *, quick: bool) -> None:
        directory = directory / ("quick" if quick else "default")
        directory.mkdir(parents=True, exist_ok=True)
        entries = QUICK if quick else {"sequence_length": SEQUENCE_LENGTH}
        recipe = directory / "recipe.yaml"
        # Every JSON document is YAML.
        recipe.write_text(json.dumps(entries), encoding="utf-8")
        self._entries = entries
        self._checkpoints = Checkpoints(directory, ("--recipe", recipe))

    def measure(self, name: str) -> dict[str, Any]:
        """Prune by METHOD or METHOD/RECONSTRUCTION at 2:4: what it took, and its parts.

        A method that no checkpoint can hold ends in memory; its row says so.

        Raises:
            ValueError: a checkpoint that was there already, and nothing says what it takes here.
        """
        named = NamedMethod.parse(name)
        if not named.servable:
            return in_memory({**self._entries, **named.entries()})
        checkpoint, times = self._checkpoints.baked((name, "2:4", 0, "bfloat16"))
        if times is None:
            raise ValueError(
                f"{checkpoint} has no record of what it took beside it, or one of another machine, "
                "other versions or other options: remove it, or give another folder for checkpoints"
            )
        costs = json.loads((checkpoint / "costs.json").read_text(encoding="utf-8"))
        report = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
        return {
            "seconds": times.prune_seconds,
            "processor_seconds": times.processor_seconds,
            "peak_bytes": costs["peak_bytes"],
            "parts": parts(costs["steps"], report),
        }


def in_memory(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Prune in a process of its own by a recipe without model and text, and write nothing."""
    entries = {"model": str(smollm2()), "dataset": str(sotu().calibration), **entries}
    start = time.perf_counter(), processor_time()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = pool.submit(_pruned, entries).result()
    times = times_since(*start)
    return {
        "seconds": times.prune_seconds,
        "processor_seconds": times.processor_seconds,
        "checkpoint": False,
        **found,
    }


def _pruned(entries: Mapping[str, Any]) -> dict[str, Any]:
    recipe, work = make_recipe(entries), Work()
    report = json.loads(prune_model(recipe, prepare(recipe), work).report.to_json())
    return {"peak_bytes": peak_bytes(), "parts": parts([asdict(c) for c in work.costs], report)}


def facts(*, quick: bool) -> dict[str, Any]:
    """What all rows share."""
    length = QUICK["sequence_length"] if quick else SEQUENCE_LENGTH
    return {"model": "SmolLM2-135M-Instruct", "sequence_length": length, "effort": "default"}
