"""SHA-256 of the weight files, in a file that `sha256sum --check` reads too."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from permllm_vllm.checkpoint.contained import contained, is_plain_name
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, CheckpointError, Problem
from permllm_vllm.checkpoint.shards import read_text

CHECKSUMS_NAME = "SHA256SUMS"
_CHUNK_BYTES = 1 << 22
_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def sha256(path: Path, count: Callable[[int], object] = lambda _: None) -> str:
    """Return the SHA-256 of a file in hexadecimal; `count` is told the bytes of every chunk read.

    Raises `OSError` when the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            count(len(chunk))
    return digest.hexdigest()


def checksums_of(directory: Path) -> str:
    """Return the content of `SHA256SUMS` for the safetensors files of a directory."""
    files = sorted(directory.glob("*.safetensors"))
    return "".join(f"{sha256(path)}  {path.name}\n" for path in files)


def read_checksums(directory: Path) -> dict[str, str] | None:
    """Map file names to their recorded SHA-256; None where nothing is recorded.

    Raises `CheckpointError` when the file cannot be read, names anything but safetensors files of
    the same directory, or one of them twice.
    """
    path = directory / CHECKSUMS_NAME
    rule = "lines of a SHA-256, two spaces and the plain name of a *.safetensors file, each once"
    try:
        lines = read_text(path).splitlines()
    except FileNotFoundError:
        return None
    except CheckpointError:
        raise
    except (OSError, ValueError) as error:
        value = f"what cannot be read: {error}"
        raise Problem(str(path), value, rule, FETCH_AGAIN).as_error() from error
    recorded: dict[str, str] = {}
    for line in lines:
        match = _LINE.fullmatch(line)
        if match is None or not is_plain_name(match[2]) or match[2] in recorded:
            raise Problem(CHECKSUMS_NAME, repr(line[:120]), rule, FETCH_AGAIN).as_error()
        recorded[match[2]] = match[1]
    return recorded


def checksum_problems(
    directory: Path, files: Iterable[str], count: Callable[[int], object] = lambda _: None
) -> list[Problem]:
    """List the files whose content is not what `SHA256SUMS` records; empty if it does not exist.

    `files` are the weight files that the checkpoint consists of: each must be recorded. `count` is
    told the bytes of every chunk read.
    """
    try:
        recorded = read_checksums(directory)
    except CheckpointError as error:
        return error.problems
    if recorded is None:
        return []
    problems = []
    for file in sorted(recorded.keys() | set(files)):
        rule = f"the file has the SHA-256 that {CHECKSUMS_NAME} records"
        if file not in recorded:
            value, remedy = "no recorded SHA-256", "remove the file, or write the checkpoint again"
        else:
            try:
                found = sha256(contained(directory, file), count)
            except CheckpointError as error:
                problems += error.problems
                continue
            except OSError as error:
                found = f"what cannot be read: {error}"
            if found == recorded[file]:
                continue
            value, remedy = found, f"{FETCH_AGAIN}: its content changed"
        problems.append(Problem(file, value, rule, remedy))
    return problems
