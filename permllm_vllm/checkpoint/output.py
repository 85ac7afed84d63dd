"""An output directory that is either complete or as it was before."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import CONFIG_NAME, INDEX_NAME, SINGLE_NAME

logger = logging.getLogger(__name__)

_PARTIAL, _REPLACED = ".partial", ".replaced"
_RANDOM_DIGITS = 8


def check_destination(output: Path, source: Path, *, force: bool) -> None:
    """Raise `CheckpointError` unless `output` may be written, or with `force` replaced."""
    destination = output.resolve()
    if destination == source.resolve():
        raise CheckpointError(
            f"output and source are both {output}; rule: the source stays as it is; remedy: choose "
            "another output directory"
        )
    if not destination.exists():
        return
    if not destination.is_dir():
        raise CheckpointError(
            f"output {output} is a file; rule: a checkpoint is a directory; remedy: choose another "
            "output"
        )
    if os.path.ismount(destination):
        raise CheckpointError(
            f"output {output} is a mount point; rule: the output is written beside its name and "
            "renamed into place; remedy: give a folder inside it"
        )
    check_outside(output, "current directory", Path.cwd())
    if not any(destination.iterdir()):
        return
    if not force:
        raise CheckpointError(
            f"output {output} is not empty; rule: nothing is overwritten unasked; remedy: choose "
            "another directory, or replace a checkpoint there with --force"
        )
    home = Path(os.path.expanduser("~"))  # Path.home() raises where there is none
    for kind, path in (("source", source), ("home", home)):
        check_outside(output, f"{kind} directory", path)
    if missing := _missing(destination):
        raise CheckpointError(
            f"output {output} is not empty and holds no {missing}; rule: only a checkpoint is "
            "replaced; remedy: choose another output directory, or empty this one"
        )


def _missing(directory: Path) -> str:
    """Return what a directory lacks of a checkpoint: its configuration, its weights or nothing."""
    for names in ([CONFIG_NAME], [SINGLE_NAME, INDEX_NAME]):
        if not any((directory / name).is_file() for name in names):
            return " or ".join(names)
    return ""


def check_outside(output: Path, kind: str, path: Path) -> None:
    """Raise `CheckpointError` where `path`, of a kind that is named, would go with `output`."""
    if path.resolve().is_relative_to(output.resolve()):
        raise CheckpointError(
            f"output {output} contains the {kind} {path}; rule: an output is made beside its name "
            "and takes the place of what is there; remedy: choose another output directory"
        )


def check_disk(output: Path, needed: int) -> None:
    """Raise `CheckpointError` when the file system of `output` has less than `needed` bytes."""
    place = output.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise CheckpointError(
            f"{place} has {_size(free)} free and what is written may take {_size(needed)}; rule: "
            "there is room before anything is written; remedy: free some space or choose another "
            "output directory"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


@contextmanager
def disk_errors_named(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into a `CheckpointError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"writing {path} failed: {error}; rule: the place is writable and takes the whole "
            "checkpoint; remedy: free some space or choose another output directory"
        ) from error


@contextmanager
def replaced_at_the_end(output: Path, *, force: bool) -> Iterator[Path]:
    """Give a new directory beside `output` that takes its name when the block succeeds.

    It takes the place of an empty directory or, with `force`, of a checkpoint: anything else that
    appeared there while the block ran stays.

    When the block raises, the new directory is removed and `output` is as it was. When the block
    succeeds and the name cannot be taken, both stay as they are and a `CheckpointError` says where
    the new directory is. A process that is killed leaves a hidden `.NAME.*.partial` directory and
    no half-written `output`; one that is killed or interrupted while it replaces `output` may leave
    the old one as `.NAME.*.replaced`. Both are named in a warning by the next write.
    """
    destination = output.resolve()
    with disk_errors_named(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
    _warn_of_leftovers(destination)
    stem = f".{destination.name}.{uuid.uuid4().hex[:_RANDOM_DIGITS]}"
    partial = destination.with_name(stem + _PARTIAL)
    with disk_errors_named(destination):
        partial.mkdir()
    try:
        yield partial
        with disk_errors_named(destination):
            _sync_tree(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    try:
        _swap(partial, destination, destination.with_name(stem + _REPLACED), force=force)
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint is complete in {partial}, but could not be renamed to {destination}: "
            f"{error.strerror or error}; rule: it takes the place of nothing but an empty "
            "directory or, with --force, a checkpoint; remedy: rename it yourself, to this name or "
            "another one"
        ) from error
    _sync(destination.parent)


def _warn_of_leftovers(destination: Path) -> None:
    """Name what killed writes left, and what is to be done with it."""
    stem = f".{glob.escape(destination.name)}.{'[0-9a-f]' * _RANDOM_DIGITS}"
    for partial in destination.parent.glob(stem + _PARTIAL):
        logger.warning("%s is left from a write in progress or cut off; remove it", partial)
    for replaced in destination.parent.glob(stem + _REPLACED):
        if destination.exists():
            logger.warning(
                "%s is left of what was replaced in %s; remove it", replaced, destination
            )
        else:
            logger.warning(
                "%s is what was in %s before a write with --force was cut off; rename it back",
                replaced,
                destination,
            )


def _swap(partial: Path, destination: Path, replaced: Path, *, force: bool) -> None:
    """Give `partial` the name `destination`; what had it goes only after that succeeded.

    Raises `OSError` where something had it and may not go.
    """
    if not force or _missing(destination):
        partial.rename(destination)  # which nothing but an empty directory makes way for
        return
    destination.rename(replaced)
    try:
        partial.rename(destination)
    except BaseException:
        replaced.rename(destination)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_tree(directory: Path) -> None:
    for folder, _, files in os.walk(directory):
        for file in files:
            _sync(Path(folder, file))
        _sync(Path(folder))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
