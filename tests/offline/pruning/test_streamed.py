"""One layer at a time gives the same checkpoint as the whole model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from permllm_offline import pipeline
from permllm_offline.cli import main
from permllm_offline.model.loading import open_source
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.streamed import PrunedLayers, can_stream
from permllm_offline.pruning.streamed_model import StreamedModel
from tests.offline.recipe_lines import Words, with_recipe
from tests.offline.tiny_models import STRUCTURES, save_tokenizer, tiny_model

FILES = ("model.safetensors", "config.json", "recipe.yaml", "report.json")
SHORT = {"steps": 6, "learning_rate": 0.3, "validation_interval": 3, "scope": "window"}


def windows(number: int, **learning: str) -> dict[str, Any]:
    """Entries of a recipe that learns so many decoder layers at a time."""
    return {"learning": SHORT | {"window": number} | learning}


def prune(model: Path, output: Path, text: Path, *words: Words) -> None:
    data = ("--dataset", str(text), "--num-samples", "6", "--sequence-length", "16")
    options = with_recipe(output.parent / "recipe.yaml", *words)
    assert main(["prune", str(model), "--output", str(output), *data, *options]) == 0


def assert_equal_ways(
    tmp_path: Path, model: Path, text: Path, patch: pytest.MonkeyPatch, *options: Words
) -> None:
    for name in ("streamed", "whole"):
        (tmp_path / name).mkdir()
        if name == "whole":
            patch.setattr(pipeline, "can_stream", lambda recipe: False)
        prune(model, tmp_path / name / "sparse", text, *options)
    for file in FILES:
        streamed, whole = (tmp_path / name / "sparse" / file for name in ("streamed", "whole"))
        assert streamed.read_bytes() == whole.read_bytes(), file


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "magnitude"),
        ("--method", "wanda", "--dtype", "bfloat16"),
        ("--method", "ria+cp-lsa", "--pattern", "4:8"),
        ("--method", "sparsegpt"),
        ("--method", "wanda+cp", "--reconstruction", "obs"),
        ("--method", "wanda+cp", "--reconstruction", "obs+blockwise"),
        ("--method", "wanda+cp", "--reconstruction", "sparsegpt+blockwise"),
        ("--method", "magnitude", "--values", "int8", "--dtype", "bfloat16"),
        ("--method", "wanda+cp", "--reconstruction", "obs", "--values", "int4"),
        ("--method", "permllm-ria", windows(1, layers="0")),
        ("--method", "permllm-wanda", windows(1), "--values=int8"),
        ("--method", "permllm-wanda", windows(2), "--reconstruction=obs"),
    ],
    ids=lambda options: "-".join(
        word if isinstance(word, str) else str(word["learning"]["window"]) for word in options[1:]
    ),
)
def test_methods(
    options: tuple[Words, ...],
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_equal_ways(tmp_path, tiny_model_directory, text_file, monkeypatch, *options)


# One of every kind of layer: an update takes longer than all else of a tiny prune.
UPDATED = {"mixtral", "qwen3_5_text", "gemma3_text"}


@pytest.mark.parametrize("model_type", sorted({*STRUCTURES} - {"llama"}))
def test_families(
    model_type: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    tiny_model(model_type).save_pretrained(model)
    save_tokenizer(model)
    reconstruction = "obs" if model_type in UPDATED else "none"
    options = ("--method", "wanda+cp", "--reconstruction", reconstruction)
    assert_equal_ways(tmp_path, model, text_file, monkeypatch, *options)


@pytest.mark.parametrize(
    ("model_type", "options", "asked"),
    [
        ("qwen3_moe", {"output_router_logits": True}, ("--method", "wanda")),
        ("mixtral", {"output_router_logits": True}, ("--method", "wanda")),
        # No norm or linear of it has a parameter while permutations are learned.
        ("olmo", {}, ("--method", "permllm-wanda", windows(1))),
        ("qwen3_5_text", {}, ("--method", "permllm-wanda", windows(1))),
    ],
)
def test_families_that_differ(
    model_type: str,
    options: dict[str, Any],
    asked: tuple[Words, ...],
    tmp_path: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tmp_path / "model"
    tiny_model(model_type, **options).save_pretrained(model)
    save_tokenizer(model)
    assert_equal_ways(tmp_path, model, text_file, monkeypatch, *asked)


@pytest.mark.parametrize(("method", "values"), [("sparsegpt", "auto"), ("magnitude", "int8")])
def test_no_two_layers_are_in_memory(
    method: str,
    values: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = StreamedModel.resident
    seen: list[int] = []

    @contextmanager
    def resident(self: StreamedModel, index: int) -> Iterator[torch.nn.Module]:
        with original(self, index) as layer:
            present = [not next(layer.parameters()).is_meta for layer in self.layers]
            assert present == [number == index for number in range(len(self.layers))]
            seen.append(index)
            yield layer
        assert all(next(layer.parameters()).is_meta for layer in self.layers)

    pruned: list[PrunedLayers] = []

    def prune_streamed(*arguments: Any) -> PrunedLayers:
        pruned.append(original_prune(*arguments))
        return pruned[0]

    original_prune = pipeline.prune_streamed
    monkeypatch.setattr(pipeline, "prune_streamed", prune_streamed)
    monkeypatch.setattr(StreamedModel, "resident", resident)
    options = ("--method", method, "--values", values)
    prune(tiny_model_directory, tmp_path / "sparse", text_file, *options)
    assert seen == [0, 1]
    with_masks = [all(group.masks for group in layer) for layer in pruned[0].decisions]
    assert with_masks == [False, True]  # the report shows the one in the middle
    assert len(load_file(tmp_path / "sparse" / "model.safetensors")) > 0


@pytest.mark.parametrize(("window", "together"), [("1", 1), ("2", 2)])
def test_layers_that_learn_together_are_in_memory_together(
    window: str,
    together: int,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original, seen = StreamedModel.resident, []

    @contextmanager
    def resident(self: StreamedModel, index: int) -> Iterator[torch.nn.Module]:
        with original(self, index) as layer:
            seen.append(sum(not next(layer.parameters()).is_meta for layer in self.layers))
            yield layer

    monkeypatch.setattr(StreamedModel, "resident", resident)
    options = ("--method", "permllm-wanda", windows(window))
    prune(tiny_model_directory, tmp_path / "sparse", text_file, *options)
    # While learning; then to prune each layer.
    assert seen == [1, together, 1, 1]


IN_WINDOWS = {"scope": "window"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"method": "ria+cp"}, True),
        ({"values": "int8"}, True),
        ({"method": "permllm-ria"}, False),
        ({"method": "permllm-ria", "learning": IN_WINDOWS}, True),
        # What chooses the layers runs the whole model.
        ({"method": "permllm-ria", "learning": IN_WINDOWS | {"layers": "auto:1"}}, False),
        ({"method": "permllm-best", "learning": IN_WINDOWS}, False),
    ],
)
def test_what_needs_the_whole_model_is_not_streamed(
    options: dict[str, Any], expected: bool, tiny_model_directory: Path
) -> None:
    model = open_source(str(tiny_model_directory)).name
    assert can_stream(make_recipe({"model": model, "method": "wanda"} | options)) is expected
