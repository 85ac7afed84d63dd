"""What a whole prune of SmolLM2-135M takes, method by method and part by part."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from .accuracy import processor_time
from .models import smollm2
from .offline import permllm_offline
from .prune_parts import REFERENCE, parts
from .texts import sotu

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

SEQUENCE_LENGTH = 512


class PipelineCost:
    """Prunes in a folder of its own, each method in a process of its own, as a user does.

    Args:
        directory: for checkpoints, overwritten from method to method.
        quick: few and short windows and steps.
    """

    def __init__(self, directory: Path, *, quick: bool) -> None:
        self._directory = directory
        entries = QUICK if quick else {"sequence_length": SEQUENCE_LENGTH}
        self._recipe = directory / "recipe.yaml"
        # Every JSON document is YAML.
        self._recipe.write_text(json.dumps(entries), encoding="utf-8")

    def measure(self, name: str) -> dict[str, Any]:
        """Prune by METHOD or METHOD/RECONSTRUCTION: what it took, and its parts."""
        method, _, reconstruction = name.partition("/")
        output = self._directory / "checkpoint"
        start, processor = time.perf_counter(), processor_time()
        permllm_offline(
            *("prune", smollm2(), "--output", output, "--recipe", self._recipe),
            *("--method", method, "--dataset", sotu().calibration),
            *(("--reconstruction", reconstruction) if reconstruction else ()),
        )
        seconds, processor = time.perf_counter() - start, processor_time() - processor
        costs = json.loads((output / "costs.json").read_text(encoding="utf-8"))
        report = json.loads((output / "report.json").read_text(encoding="utf-8"))
        shutil.rmtree(output)
        return {
            "seconds": round(seconds, 1),
            "processor_seconds": round(processor, 1),
            "peak_bytes": costs["peak_bytes"],
            "parts": parts(costs["steps"], report),
        }


def facts(*, quick: bool) -> dict[str, Any]:
    """What all rows share."""
    length = QUICK["sequence_length"] if quick else SEQUENCE_LENGTH
    return {"model": "SmolLM2-135M-Instruct", "sequence_length": length, "effort": "default"}
