"""A model in 8 bits and the dense one that it stands for, side by side in a folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate
from tests.offline.tiny_models import save_tokenizer, tiny_model


def save_dense(directory: Path, model_type: str, **sizes: object) -> Path:
    tiny_model(model_type, **sizes).to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@contextmanager
def changed_config(directory: Path) -> Iterator[dict[str, Any]]:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    yield config
    file.write_text(json.dumps(config))


def pruned(place: Path, name: str, text: Path, *options: str) -> Path:
    output = place / "out" / name / "sparse"
    data = ("--dataset", str(text), "--num-samples", "6", "--sequence-length", "16", "--force")
    assert main(["prune", str(place / name), "--output", str(output), *data, *options]) == 0
    return output


def assert_pruned_alike(place: Path, text: Path, *options: str) -> Path:
    """The checkpoints are equal to the byte, but for what says of which model they are."""
    scaled, dense = (pruned(place, name, text, *options) for name in ("scaled", "dense"))
    assert {file.name for file in scaled.iterdir()} == {file.name for file in dense.iterdir()}
    for file in ("model.safetensors", "config.json", "SHA256SUMS"):
        assert (scaled / file).read_bytes() == (dense / file).read_bytes(), file
    assert validate(scaled) == []
    return scaled


def assert_measured_alike(models: Path, text: Path, results: Path) -> None:
    """The perplexities are equal to the bit."""
    found = {}
    for name in ("scaled", "dense"):
        file = results / f"{name}.json"
        asked = ("--dataset", str(text), "--sequence-length", "16", "--json", str(file))
        assert main(["eval", str(models / name), *asked]) == 0
        found[name] = json.loads(file.read_text())["perplexity"]
    assert found["scaled"] == found["dense"]
