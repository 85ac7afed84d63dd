"""The file that a command writes its result to: looked at before anything is made, by one run."""

import argparse
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.packages import cache_dir
from benchmarks.records.rows import NOTHING, Rows


@contextmanager
def held(parser: argparse.ArgumentParser, path: Path | None) -> Iterator[None]:
    """Hold a result as long as a `with` block lasts; ends the command where another run does."""
    if path is None:
        yield
        return
    folder = cache_dir() / "results"
    folder.mkdir(exist_ok=True)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    lock = FileLock(folder / f"{name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        parser.error(
            f"{path}: another run writes it, and each would lose the other's rows: wait until it "
            "has ended, or give another file"
        )
    try:
        yield
    finally:
        lock.release()


@contextmanager
def kept_rows(
    parser: argparse.ArgumentParser,
    path: Path | None,
    facts: Mapping[str, Any],
    key: Sequence[str],
    older: Mapping[str, Any] = NOTHING,
) -> Iterator[Rows]:
    """`Rows` of a command, held by it; ends the command where the file cannot go on."""
    with held(parser, path):
        try:
            rows = Rows(path, facts, key, older)
        except ValueError as error:
            parser.error(str(error))
        yield rows


@contextmanager
def new_result(parser: argparse.ArgumentParser, path: Path | None) -> Iterator[None]:
    """Hold a file that is written as a whole; ends the command where one is there already."""
    with held(parser, path):
        if path is not None and path.exists():
            parser.error(
                f"{path} is there, and a run adds nothing to it: remove it, or give another file"
            )
        yield
