"""Finished steps of a prune on disk, so that a run that was killed goes on from there.

A step is one safetensors file in a folder beside the output. It appears under its name only when it
is complete, and holds exactly what the step computed: a resumed run writes the same bytes as one
that was never interrupted. A long step keeps its state now and then, in a file of its own that goes
when the step is finished.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.run.costs import Cost, measured
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.output import disk_errors_named
from permllm_vllm.checkpoint.shard import Shard

logger = logging.getLogger(__name__)

_IDENTITY, _FACTS, _COST = "identity", "facts", "cost"
_INTERVAL = "-interval"


@dataclass(frozen=True)
class Step:
    """Result of a step: tensors, and facts that JSON can hold."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def on_cpu(self) -> Step:
        """The same step with its tensors on the CPU, for a file or another process."""
        tensors = {name: tensor.detach().cpu() for name, tensor in self.tensors.items()}
        return Step(tensors, self.facts)


class Work:
    """Steps that are computed and not kept; ``costs`` says what each took, in order."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step."""
        with self.measured(name):
            return compute()

    def common_step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step in which the processes of a prune work together."""
        return self.step(name, compute)

    def finished(self, name: str) -> bool:
        """Whether the result of a step is kept."""
        return False

    def measured(self, name: str) -> AbstractContextManager[None]:
        """Count what is done in the context as a step that is never kept."""
        return measured(name, self.costs)

    def interval(self, name: str) -> Step | None:
        """Return the state in which the step of that name was last kept, or None."""
        return None

    def keep_interval(self, name: str, state: Step) -> None:
        """Keep the state of an unfinished step, in place of the last one."""


class WorkFolder(Work):
    """Steps that are kept in a folder until the output is complete, and what they took.

    Args:
        directory: of the steps; it comes into being with the first one.
        identity: of recipe, model and data; steps of another identity are never used.
        resume: whether steps that are there already are used, or removed.

    Raises:
        OfflineError: asked to resume what has another identity.
    """

    def __init__(self, directory: Path, identity: str, *, resume: bool) -> None:
        super().__init__()
        self.directory = directory
        self.identity = identity
        if not directory.exists():
            if resume:
                logger.warning("nothing to resume: %s is not there; starting anew", directory)
            return
        if not resume:
            logger.warning("%s is left from a run that was cut off; removed", directory)
            self.remove()
            return
        other = [path.name for path in self._steps() if _metadata(path)[_IDENTITY] != identity]
        if other:
            raise OfflineError(
                f"{directory} holds steps of another recipe, model, data set or version (the "
                f"first: {other[0]}): they cannot be resumed. Give the options of that run, or "
                "leave --resume out to start anew."
            )

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step, from disk where it is there, else computed and kept."""
        path = self._path(name)
        if path.exists():
            self.costs += _costs(path)
            return _read(path)
        done = super().step(name, compute)
        self._write(path, done, {_COST: json.dumps(asdict(self.costs[-1]))})
        self._path(name + _INTERVAL).unlink(missing_ok=True)
        return done

    def finished(self, name: str) -> bool:
        """Whether the result of a step is kept."""
        return self._path(name).exists()

    def interval(self, name: str) -> Step | None:
        """Return the state in which the step of that name was last kept, or None."""
        path = self._path(name + _INTERVAL)
        return _read(path) if path.exists() else None

    def keep_interval(self, name: str, state: Step) -> None:
        """Keep the state of an unfinished step, in place of the last one."""
        self._write(self._path(name + _INTERVAL), state, {})

    def _write(self, path: Path, done: Step, more: Mapping[str, str]) -> None:
        metadata = {_IDENTITY: self.identity, _FACTS: json.dumps(done.facts), **more}
        partial = path.with_suffix(".partial")
        with disk_errors_named(path):
            self.directory.mkdir(parents=True, exist_ok=True)
            tensors = {key: tensor.contiguous() for key, tensor in done.on_cpu().tensors.items()}
            save_file(tensors, partial, metadata=metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)

    def read(self, name: str) -> Step:
        """Return the result of a finished step."""
        return _read(self._path(name))

    def remove(self) -> None:
        """Remove the folder: the output is complete."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}.safetensors"

    def _steps(self) -> list[Path]:
        return sorted(self.directory.glob("*.safetensors"))


def _read(path: Path) -> Step:
    with _damage_named(path):
        shard = Shard(path)
        tensors = {name: shard.tensor(name) for name in shard.headers}
        return Step(tensors, json.loads(shard.metadata.get(_FACTS, "{}")))


def _costs(path: Path) -> list[Cost]:
    found = _metadata(path).get(_COST)
    return [] if found is None else [Cost(**json.loads(found))]


def _metadata(path: Path) -> dict[str, str]:
    with _damage_named(path):
        return {_IDENTITY: ""} | Shard(path).metadata


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise OfflineError(
            f"{path} is no finished step ({error}): the disk or another program damaged it. Leave "
            "--resume out to start anew."
        ) from error
