"""What a whole prune of SmolLM2-135M takes, method by method and part by part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.pruning.checkpoints import SEQUENCE_LENGTH, Checkpoints
from benchmarks.pruning.prune_parts import REFERENCE, parts

METHODS = (
    REFERENCE,
    "wanda+cp",
    "sparsegpt",
    "wanda+cp/obs+blockwise",
    "permllm-wanda",
    "permllm-best",
)
"""METHOD or METHOD/RECONSTRUCTION, each with its defaults."""

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
        self._checkpoints = Checkpoints(directory, ("--recipe", recipe))

    def measure(self, name: str) -> dict[str, Any]:
        """Prune by METHOD or METHOD/RECONSTRUCTION at 2:4: what it took, and its parts.

        Raises:
            ValueError: a checkpoint that was there already, and nothing says what it takes here.
        """
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


def facts(*, quick: bool) -> dict[str, Any]:
    """What all rows share."""
    length = QUICK["sequence_length"] if quick else SEQUENCE_LENGTH
    return {"model": "SmolLM2-135M-Instruct", "sequence_length": length, "effort": "default"}
