"""Finished steps of a run on disk, so that a run that was killed goes on from there.

A step is one safetensors file in a folder beside the output. It appears under its name only when it
is complete, and holds exactly what the step computed: a resumed run writes the same bytes as one
that was never interrupted. A long step keeps its state now and then, in a file of its own that goes
when the step is finished.

One run at a time works in a folder: it holds a lock that the system takes back from a process that
is killed.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout
from safetensors.torch import save_file
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.run.costs import Clock, Cost, costs_until_now, measured
from permllm_offline.run.identity import differences
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.output import disk_errors_named
from permllm_vllm.checkpoint.shard import Shard

logger = logging.getLogger(__name__)

_IDENTITY, _TEXT, _FACTS, _COSTS = "identity", "text", "facts", "costs"
_LOCK = "lock"
STEP_SUFFIX = ".safetensors"
"""Of finished steps and intervals. Whatever else lies there, a run left that was killed."""
INTERVAL = "-interval"
"""Ends the name under which the state of an unfinished step is kept."""


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
        self._running: list[Clock] = []

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
        return measured(name, self.costs, self._running)

    def interval(self, name: str) -> Step | None:
        """Return the state in which the step of that name was last kept, or None."""
        return None

    def interval_file(self, name: str) -> Path | None:
        """Return where ``interval`` is read from, or None."""
        return None

    def keep_interval(self, name: str, state: Step) -> None:
        """Keep the state of an unfinished step, in place of the last one."""


class WorkFolder(Work):
    """Steps that are kept in a folder until the output is complete, and what they took.

    The folder is this run's alone until the end of the context, or ``release``.

    Args:
        directory: of the steps.
        identity: of recipe and model (``identity.identity_text``); steps of another are never used.
        restart: whether steps that are there are removed when work begins, in place of used.

    Raises:
        OfflineError: another run works in the folder, or it holds steps of another identity.
        CheckpointError: the folder cannot be made.
    """

    def __init__(self, directory: Path, identity: str, *, restart: bool = False) -> None:
        super().__init__()
        self.directory = directory
        self.identity = identity
        self._text, self._begun = "", False
        self._restart = restart
        self._lock = _locked(directory)
        try:
            if not restart:
                check_steps(directory, identity)
        except BaseException:
            self.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and self._begun and self._others():
            logger.warning(
                "%s keeps the finished steps: the same command %s",
                self.directory,
                "without --restart goes on from them"
                if self._restart
                else "goes on from them, and with --restart begins anew",
            )
        self.release()

    def begin(self, text: str = "") -> None:
        """Use the steps that are there, or remove them, before the first step of this run.

        Args:
            text: what the calibration text adds to the identity.

        Raises:
            OfflineError: steps of another text, or steps that cannot be removed.
        """
        self._text = text
        if not self._restart:
            check_steps(self.directory, self.identity, text)
            self._remove(path for path in self._others() if path.suffix != STEP_SUFFIX)
        elif self._others():
            logger.warning("%s is left from a run that was cut off; removed", self.directory)
            self._empty()
        if kept := self.kept():  # the last one has the costs of all before it
            self.costs += _costs(self._path(kept[0]))
        self._begun = True  # from here on the steps are this run's

    def kept(self) -> list[str]:
        """Names of what is kept, finished steps and ``INTERVAL`` of others, the last one first."""
        return kept_steps(self.directory)

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step, from disk where it is there, else computed and kept."""
        path = self._path(name)
        if path.exists():
            return self._read(path)
        done = super().step(name, compute)
        self._write(path, done)
        self._path(name + INTERVAL).unlink(missing_ok=True)
        return done

    def finished(self, name: str) -> bool:
        """Whether the result of a step is kept."""
        return self._path(name).exists()

    def interval(self, name: str) -> Step | None:
        """Return the state in which the step of that name was last kept, or None."""
        return None if (path := self.interval_file(name)) is None else self._read(path)

    def interval_file(self, name: str) -> Path | None:
        """Return where ``interval`` is read from, or None."""
        path = self._path(name + INTERVAL)
        return path if path.exists() else None

    def keep_interval(self, name: str, state: Step) -> None:
        """Keep the state of an unfinished step, in place of the last one."""
        self._write(self._path(name + INTERVAL), state)

    def read(self, name: str) -> Step:
        """Return the result of a finished step."""
        return self._read(self._path(name))

    def remove(self) -> None:
        """Remove the folder: the output is complete.

        Raises:
            OfflineError: it cannot be removed.
        """
        self._begun = False
        self._empty()
        self.release()
        if self.directory.exists():
            raise _stays(self.directory, self.directory, "not empty")

    def release(self) -> None:
        """Let other runs have the folder; one that holds no steps goes."""
        if not self._lock.is_locked:
            return
        if not self._others():
            shutil.rmtree(self.directory, ignore_errors=True)
        self._lock.release()

    def _write(self, path: Path, done: Step) -> None:
        metadata = {
            _IDENTITY: self.identity,
            _TEXT: self._text,
            _FACTS: json.dumps(done.facts),
            _COSTS: json.dumps([asdict(c) for c in costs_until_now(self.costs, self._running)]),
        }
        partial = path.with_suffix(".partial")
        with disk_errors_named(path):
            tensors = {key: tensor.contiguous() for key, tensor in done.on_cpu().tensors.items()}
            save_file(tensors, partial, metadata=metadata)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)

    def _read(self, path: Path) -> Step:
        _check_step(path, self.identity, self._text)
        return step_at(path)

    def _path(self, name: str) -> Path:
        return self.directory / f"{name}{STEP_SUFFIX}"

    def _others(self) -> list[Path]:
        """What the folder holds beside the lock."""
        if not self.directory.exists():
            return []
        return sorted(path for path in self.directory.iterdir() if path.name != _LOCK)

    def _empty(self) -> None:
        """Remove what the folder holds beside the lock; raises OfflineError where that fails.

        The last steps go first: where this is cut off, those that are left can be gone on from.
        """
        self._remove(sorted(self._others(), key=lambda path: -path.lstat().st_mtime_ns))

    def _remove(self, paths: Iterable[Path]) -> None:
        """Remove files and folders; raises OfflineError where that fails."""
        for path in paths:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            except OSError as error:
                raise _stays(path, self.directory, str(error.strerror)) from error


def kept_steps(directory: Path) -> list[str]:
    """Names of what a folder keeps, finished steps and ``INTERVAL`` of others, the last one first.

    There need be no folder.
    """
    files = sorted(directory.glob(f"*{STEP_SUFFIX}"), key=lambda file: file.name)
    files.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)
    return [file.stem for file in files]


def step_at(path: Path) -> Step:
    """Read a step that was checked, each tensor when it is asked for."""
    with _damage_named(path):
        shard = Shard(path)
        return Step(_KeptTensors(shard), json.loads(shard.metadata.get(_FACTS, "{}")))


def check_steps(directory: Path, identity: str, text: str = "") -> None:
    """Check that the steps of a folder are those of a run; nothing is written.

    Args:
        directory: of the steps, if it is there.
        identity: of recipe and model.
        text: what the calibration text adds to the identity; empty before it is known.

    Raises:
        OfflineError: a step of another run, or a damaged one.
    """
    for path in sorted(directory.glob(f"*{STEP_SUFFIX}")):
        _check_step(path, identity, text)


def _check_step(path: Path, identity: str, text: str) -> None:
    found = metadata_of(path)
    if found[_IDENTITY] != identity or (text and found[_TEXT] != text):
        other = "the calibration text is another"
        if found[_IDENTITY] != identity:
            other = differences(found[_IDENTITY], identity)
        raise OfflineError(
            f"{path.parent} holds steps of another recipe, model, data set or version "
            f"({other}): this run cannot go on from them. Give the options of that run, "
            "--restart to remove its steps, or another --output."
        )


class _KeptTensors(Mapping[str, Tensor]):
    """Tensors of a step on disk, each read whenever it is asked for."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shard.headers:
            raise KeyError(name)
        with _damage_named(self._shard.path):
            return self._shard.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard.headers)

    def __len__(self) -> int:
        return len(self._shard.headers)


def _stays(path: Path, directory: Path, reason: str) -> OfflineError:
    return OfflineError(
        f"{path} is of no more use and cannot be removed ({reason}): remove {directory} by hand, "
        "or give another --output."
    )


def is_at_work(directory: Path) -> bool:
    """Whether a run has the folder now; nothing is written."""
    if not (directory / _LOCK).exists():
        return False
    lock = FileLock(directory / _LOCK)
    with suppress(Timeout):
        lock.acquire(timeout=0)
    free = lock.is_locked
    lock.release()
    return not free


def _locked(directory: Path) -> FileLock:
    """Make a folder and take its lock, which ends with the process at the latest."""
    with disk_errors_named(directory):
        directory.mkdir(parents=True, exist_ok=True)
        lock = FileLock(directory / _LOCK)
        with suppress(Timeout):
            lock.acquire(timeout=0)
    if not lock.is_locked:
        raise OfflineError(
            f"another run to the same output is at work in {directory}: wait until it ends, or "
            "give another --output."
        )
    return lock


def _costs(path: Path) -> list[Cost]:
    """What a run took until it kept a step."""
    return [Cost(**cost) for cost in json.loads(metadata_of(path).get(_COSTS, "[]"))]


def metadata_of(path: Path) -> dict[str, str]:
    """Return what a kept step says of itself; raises OfflineError where it is damaged."""
    with _damage_named(path):
        return {_IDENTITY: "", _TEXT: ""} | Shard(path).metadata


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise OfflineError(
            f"{path} is no finished step ({error}): the disk or another program damaged it. Give "
            "--restart to start anew."
        ) from error
