"""Nothing that a checkpoint names is looked for outside it."""

from __future__ import annotations

from pathlib import Path

from permllm_vllm.checkpoint.errors import Problem

LONGEST_NAME = 1000

_UNTRUSTED = "do not use this checkpoint unless you trust its origin; fetch it again"


def contained(directory: Path, name: str) -> Path:
    """Return the path of a file of `directory`, which need not exist.

    Raises `CheckpointError` for a link out of the directory and for what is no regular file. Only
    in the cache of the Hugging Face hub links may lead elsewhere, into `blobs` of the same model.
    """
    path = directory / name
    if path.exists() and not path.is_file():
        remedy = "put the file itself there"
        raise Problem(str(path), "no regular file", "a file", remedy).as_error()
    if not path.is_symlink():
        return path
    home, target = directory.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in allowed):
        rule = "a file of the checkpoint, or a link into the blobs of the same hub cache"
        remedy = "copy the file in place of the link, if you trust its origin"
        raise Problem(str(path), f"a link to {target}", rule, remedy).as_error()
    return path


def is_plain_name(file: object) -> bool:
    """Tell whether an index may name this as a safetensors file of its directory."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and file.isprintable()
        and len(file) <= LONGEST_NAME
        and not any(character in file for character in "/\\")
    )


def checked_name(tensor: str, source: Path) -> str:
    """Return the name of a tensor; raises `CheckpointError` when no model has such a name."""
    if not tensor.isprintable() or not 0 < len(tensor) <= LONGEST_NAME:
        value = f"a tensor named {tensor[:LONGEST_NAME]!r} ({len(tensor)} characters)"
        rule = f"names of 1 to {LONGEST_NAME} printable characters"
        raise Problem(str(source), value, rule, _UNTRUSTED).as_error()
    return tensor
