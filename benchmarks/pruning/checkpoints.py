"""Pruned checkpoints of a model in a folder: each is baked once, for whoever measures it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.pruning.commands import prune
from benchmarks.records.machine import comparable, machine, revision, versions
from benchmarks.texts import sotu

SEQUENCE_LENGTH = 512


@dataclass(frozen=True)
class Sparse:
    """What tells one checkpoint of a model from another."""

    method: str
    pattern: str
    effort: str
    values: str
    seed: int


@dataclass(frozen=True)
class Times:
    """Of a prune; ``processor_seconds`` counts all threads: other work does not add to it."""

    prune_seconds: float
    processor_seconds: float
    threads: int


class Checkpoints:
    """Bakes what the folder lacks, each in a process of its own, as a user does.

    What a checkpoint took is kept beside it, with machine, versions, commit and options.

    Args:
        directory: made where it is missing.
        model: the dense one.
        options: of every prune, beside those that follow from its key; a path that is a file stands
            for its content.
    """

    def __init__(self, directory: Path, model: Path, options: Sequence[str | Path] = ()) -> None:
        self._directory, self._model, self._options = directory, model, options

    def baked(self, key: Sparse) -> tuple[Path, Times | None]:
        """The checkpoint of a key, and what it took where that is known.

        It is not known where the record is missing or of an older form, nor where the checkpoint
        was made on another machine, with other versions or with other options.
        """
        name = "_".join(map(str, asdict(key).values())).translate(str.maketrans("/:", "--"))
        checkpoint = self._directory / name
        record = checkpoint.with_name(f"{name}.times.json")
        if not checkpoint.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            values = "auto" if key.values == "bfloat16" else key.values  # the dtype of the model
            start, made_with = (time.perf_counter(), processor_time()), revision()
            prune(
                *(self._model, checkpoint, "--dataset", sotu().calibration),
                *("--method", key.method, "--pattern", key.pattern, "--seed", str(key.seed)),
                *("--effort", key.effort, "--values", values),
                *self._options,
            )
            times = asdict(times_since(*start))
            found = {**self._conditions(), "commit": made_with, "times": times}
            record.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return checkpoint, self._known(record)

    def _known(self, record: Path) -> Times | None:
        if not record.exists():
            return None
        found = json.loads(record.read_text(encoding="utf-8"))
        if "times" not in found or self._compared(found) != self._compared(self._conditions()):
            return None
        return Times(**found["times"])

    def _conditions(self) -> dict[str, Any]:
        options = [
            f"sha256:{hashlib.sha256(option.read_bytes()).hexdigest()}"
            if isinstance(option, Path) and option.is_file()
            else str(option)
            for option in self._options
        ]
        return {"machine": machine(), "versions": versions(), "options": options}

    @staticmethod
    def _compared(conditions: Mapping[str, Any]) -> tuple[Any, ...]:
        cpu = conditions["machine"]
        return *comparable(cpu).values(), conditions["versions"], conditions["options"]


def processor_time() -> float:
    """Seconds that the threads of this process and of those that it waited for have run."""
    return sum(os.times()[:4])


def times_since(wall: float, processor: float) -> Times:
    """What went by since `time.perf_counter` and `processor_time` gave these."""
    seconds = round(time.perf_counter() - wall, 1), round(processor_time() - processor, 1)
    return Times(*seconds, torch.get_num_threads())
