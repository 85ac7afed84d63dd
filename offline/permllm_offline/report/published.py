"""A checkpoint as it may be seen by others: without the folders of the machine that made it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from permllm_offline.report import papers
from permllm_offline.run.local_path import local_path


def publish(checkpoint: Path, directory: Path) -> None:
    """Fill a directory with links to the files of a checkpoint, and copies of what names folders.

    A recipe names the model and its data sets: those that lie on this machine keep their last name.
    """
    rewritten: dict[str, Callable[[str], str]] = {
        papers.RECIPE: _recipe_text,
        papers.REPORT: _report_text,
    }
    for file in checkpoint.rglob("*"):
        if not file.is_file():
            continue  # the hub's client looks into no folder that is a link
        name = file.relative_to(checkpoint)
        published = directory / name
        published.parent.mkdir(parents=True, exist_ok=True)
        rewrite = rewritten.get(str(name))
        if rewrite is None:
            published.symlink_to(file.resolve())
        else:
            published.write_text(rewrite(file.read_text(encoding="utf-8")), encoding="utf-8")


def public_recipe(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a recipe, paths of this machine without their folders."""
    dataset = recipe.get("dataset")
    if isinstance(dataset, list | tuple):
        dataset = [public_name(one) for one in dataset]
    elif dataset is not None:
        dataset = public_name(dataset)
    return {**recipe, "model": public_name(recipe["model"]), "dataset": dataset}


def public_name(name: str) -> str:
    """A name of the hub as it is; of a file or a folder the last part of its path."""
    path = local_path(name)
    if not (path.is_absolute() or path.exists()):
        return name
    return path.name if path.name.strip(".") else path.resolve().name


def _recipe_text(text: str) -> str:
    return yaml.safe_dump(public_recipe(yaml.safe_load(text)), sort_keys=False)


def _report_text(text: str) -> str:
    report = json.loads(text)
    return json.dumps(report | {"recipe": public_recipe(report["recipe"])}, indent=2) + "\n"
