"""Pruned checkpoints of SmolLM2-135M in a folder: each is baked once, for whoever measures it."""

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

from benchmarks.models import smollm2
from benchmarks.pruning.commands import permllm_offline, prune
from benchmarks.pruning.named_method import CONVERTED, NamedMethod
from benchmarks.records.machine import comparable, machine, revision, versions
from benchmarks.texts import sotu
from permllm_offline.preparation.recipe_input import make_recipe

SEQUENCE_LENGTH = 512

KEY = ("method", "pattern", "seed", "values")
"""What tells one checkpoint from another; a method is that of `NamedMethod`."""

Key = tuple[str, str | None, int | None, str]
"""Values of ``KEY``."""


@dataclass(frozen=True)
class Times:
    """Of a prune, or of the conversion after it.

    ``processor_seconds`` counts all threads: other work does not add to it.
    """

    prune_seconds: float
    processor_seconds: float
    threads: int


class Checkpoints:
    """Bakes what the folder lacks, each in a process of its own, as a user does.

    What a checkpoint took is kept beside it, with machine, versions, commit and options.

    Args:
        directory: made where it is missing.
        options: of every prune, beside those that follow from its key; a path that is a file stands
            for its content.
        effort: of every prune; None is the default one.
    """

    def __init__(
        self, directory: Path, options: Sequence[str | Path] = (), effort: str | None = None
    ) -> None:
        self._directory, self._options, self._effort = directory, options, effort

    def baked(self, key: Key) -> tuple[Path, Times | None]:
        """The checkpoint of a key, and what it took where that is known.

        It is not known where the record is missing or of an older form, nor where the checkpoint
        was made on another machine, with other versions or with other options.
        """
        checkpoint = self._path(key)
        record = checkpoint.with_name(f"{checkpoint.name}.times.json")
        if not checkpoint.exists():
            self._directory.mkdir(parents=True, exist_ok=True)
            before = self._before(key)
            start, made_with = (time.perf_counter(), processor_time()), revision()
            if before is None:
                self._bake(key, checkpoint)
            else:
                self._convert(key, before, checkpoint)
            times = asdict(times_since(*start))
            found = {**self._conditions(), "commit": made_with, "times": times}
            record.write_text(json.dumps(found) + "\n", encoding="utf-8")
        return checkpoint, self._known(record)

    def _path(self, key: Key) -> Path:
        return self._directory / "_".join(map(str, key)).translate(str.maketrans("/:", "--"))

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
            for option in (*self._options, *self._effort_option())
        ]
        return {"machine": machine(), "versions": versions(), "options": options}

    @staticmethod
    def _compared(conditions: Mapping[str, Any]) -> tuple[Any, ...]:
        cpu = conditions["machine"]
        return *comparable(cpu).values(), conditions["versions"], conditions["options"]

    def _bake(self, key: Key, checkpoint: Path) -> None:
        name, pattern, seed, values = key
        named = NamedMethod.parse(name)
        varied = self._varied(named, checkpoint) if named.variant else self._effort_option()
        prune(
            *(smollm2(), checkpoint, "--dataset", sotu().calibration),
            *("--method", named.method, "--pattern", str(pattern), "--seed", str(seed)),
            *(("--values", values) if values != "bfloat16" else ()),
            *(("--reconstruction", named.reconstruction) if named.reconstruction else ()),
            *self._options,
            *varied,
        )

    def _before(self, key: Key) -> Path | None:
        """The checkpoint that another one is converted from, or None where that is pruned."""
        name, pattern, seed, _ = key
        named = NamedMethod.parse(name)
        if named.variant not in CONVERTED:
            return None
        return self.baked((named.pruned, pattern, seed, "bfloat16"))[0]

    def _convert(self, key: Key, before: Path, checkpoint: Path) -> None:
        name, _, _, values = key
        reads = CONVERTED[str(NamedMethod.parse(name).variant)]
        text = ("--dataset", sotu().calibration) if reads else ()
        permllm_offline("convert", before, "--output", checkpoint, "--values", values, *text)

    def _effort_option(self) -> tuple[str, ...]:
        return ("--effort", self._effort) if self._effort else ()

    def _varied(self, named: NamedMethod, checkpoint: Path) -> tuple[str, Path]:
        """A recipe file with the variant in it, and the effort, which would come before a file."""
        recipe = make_recipe({"model": str(smollm2()), **named.entries()}, self._effort)
        file = checkpoint.with_name(f"{checkpoint.name}.recipe.yaml")
        file.write_text(recipe.to_yaml(), encoding="utf-8")
        return "--recipe", file


def processor_time() -> float:
    """Seconds that the threads of this process and of those that it waited for have run."""
    return sum(os.times()[:4])


def times_since(wall: float, processor: float) -> Times:
    """What went by since `time.perf_counter` and `processor_time` gave these."""
    seconds = round(time.perf_counter() - wall, 1), round(processor_time() - processor, 1)
    return Times(*seconds, torch.get_num_threads())
