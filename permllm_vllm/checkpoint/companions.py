"""What lies beside the weights of a model, and goes with every checkpoint of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from permllm_vllm.checkpoint.contained import contained
from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.shards import CONFIG_NAME

WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
    ".index.json",
)
_TEMPLATES = "additional_chat_templates"
_MODULES = "modules.json"
"""Of sentence-transformers: what follows the model, each in a folder with its configuration."""


def companion_files(source: Path) -> Iterator[Path]:
    """Yield tokenizer, chat templates, generation config, licence: all but weights and config.

    With what sentence-transformers does behind the model (pooling, a dense layer), weights too.

    Names are relative to `source`. Raises `CheckpointError` for a link that leads out of it, for a
    file that cannot be read, and for weights of such a module that are no safetensors.
    """
    yield from _files(source, source)
    if (templates := source / _TEMPLATES).is_dir() and not templates.is_symlink():
        yield from _files(source, templates)
    for folder in module_folders(source):
        for path in sorted(folder.iterdir()):
            if path.name == CONFIG_NAME or path.suffix == ".safetensors":
                yield _readable(source, path)
        weights = [path for path in folder.iterdir() if path.name.endswith(WEIGHT_SUFFIXES)]
        if weights and not any(path.suffix == ".safetensors" for path in weights):
            rule = f"weights of what {_MODULES} names are safetensors"
            remedy = "write the model with sentence-transformers' `save` of today, and take that"
            raise Problem(str(weights[0]), "other weights", rule, remedy).as_error()


def check_companions(source: Path) -> None:
    """Raise `CheckpointError` for what `companion_files` cannot give, before long work."""
    for _ in companion_files(source):
        pass


def copy_companions(source: Path, directory: Path) -> None:
    """Copy them; raises as `companion_files`, and OSError where one cannot be written."""
    for name in companion_files(source):
        target = directory / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, target)


def _files(source: Path, folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == CONFIG_NAME or not path.is_file():
            continue
        if not path.name.endswith(WEIGHT_SUFFIXES):
            yield _readable(source, path)


def module_folders(source: Path) -> list[Path]:
    """List the folders right in `source` that its `modules.json` names, if it is such a list."""
    try:
        modules = json.loads((source / _MODULES).read_text(encoding="utf-8"))
        names = sorted({module["path"] for module in modules} - {"", ".", ".."})
    except (OSError, ValueError, TypeError, KeyError):
        return []
    plain = [source / name for name in names if isinstance(name, str) and Path(name).name == name]
    return [folder for folder in plain if folder.is_dir() and not folder.is_symlink()]


def _readable(source: Path, path: Path) -> Path:
    """The name of a file, which is one of the source and can be opened."""
    name = path.relative_to(source)
    try:
        contained(source, str(name)).open("rb").close()
    except OSError as error:
        rule = "what lies beside the weights is copied"
        remedy = "make it readable, or remove it"
        value = f"a file that cannot be opened: {error.strerror or error}"
        raise Problem(str(path), value, rule, remedy).as_error() from error
    return name
