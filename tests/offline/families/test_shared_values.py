"""Gemma 4: layers that read keys and values of others, and what each token adds to a layer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.forecast.memory import memory_forecast
from permllm_offline.forecast.outline import outline
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.model.stored import read_stored
from permllm_offline.pipeline import prune
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning import streamed_windows
from permllm_offline.recipe.schema import Recipe
from permllm_offline.text.evaluation import perplexity
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.validation import validate
from tests.offline.tiny_models import (
    GEMMA4_EXPERTS,
    fuse_experts,
    random_text,
    save_tokenizer,
    tiny_model,
)

SHARING = [f"model.layers.{layer}.self_attn.{one}_proj" for layer in (2, 3) for one in ("k", "v")]
"""What the last two layers do not have, though published checkpoints hold it."""
SHORT: dict[str, Any] = {
    "num_samples": 12,
    "sequence_length": 24,
    "evaluation_windows": 4,
    "learning": {"steps": 4, "validation_interval": 2},
    "distillation": {"steps": 4, "validation_interval": 2, "self_windows": 2},
    "blockwise": {"steps": 4, "validation_interval": 2},
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model stored as published ones are, with tensors that nothing reads, and text."""
    directory = tmp_path_factory.mktemp("gemma4")
    model = tiny_model("gemma4_text", tie_word_embeddings=True)
    for layer in model.model.layers:
        layer.layer_scalar.fill_(0.7)
    model.save_pretrained(directory)
    save_tokenizer(directory)
    file = directory / "model.safetensors"
    unread = {f"{name}.weight": torch.randn(64, 128) for name in SHARING}
    save_file(load_file(file) | unread, file, metadata={"format": "pt"})
    (directory / "text.txt").write_text(random_text(3000, 1), encoding="utf-8")
    return directory


def recipe_of(directory: Path, **options: Any) -> Recipe:
    text = str(directory / "text.txt")
    return make_recipe({"model": str(directory), "dataset": [text]} | SHORT | options)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda+cp"},
        {"method": "wanda+cp", "reconstruction": "obs+blockwise"},
        {"method": "permllm-wanda"},
        {"method": "permllm-wanda", "learning": SHORT["learning"] | {"scope": "window"}},
        {"method": "permllm-best"},
    ],
    ids=["streamed", "tuned", "learned", "learned in windows", "distilled"],
)
def test_what_is_measured_is_what_is_written(
    directory: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    recipe = recipe_of(directory, **options)
    report = prune(recipe, tmp_path / "sparse")
    assert validate(tmp_path / "sparse") == []
    source = open_source(str(tmp_path / "sparse"))
    written = load_model(source, torch.float32, torch.device("cpu"))
    windows = prepare(recipe).windows
    assert windows is not None
    found = perplexity(written, windows.held_out)
    assert found == pytest.approx(report.perplexity_after, rel=1e-4)
    assert found != pytest.approx(report.perplexity_before, rel=1e-2)


def test_what_no_layer_reads_is_left_out(directory: Path, tmp_path: Path) -> None:
    prune(recipe_of(directory, method="wanda+cp"), tmp_path / "sparse")
    reader = open_source(str(tmp_path / "sparse")).reader()
    assert reader.quantization is not None
    assert reader.quantization.absent == SHARING
    assert {name.rpartition(".")[0] for name in reader.names()}.isdisjoint(SHARING)
    planned = outline(read_stored(str(directory)), Pattern(2, 4), 64, "float32", permuted=True)
    assert {name.rpartition(".")[0] for name in planned.dense_after}.isdisjoint(SHARING)


def test_folds_reach_no_values_that_others_read(directory: Path, tmp_path: Path) -> None:
    prune(recipe_of(directory, method="wanda+cp"), tmp_path / "sparse")
    quantization = open_source(str(tmp_path / "sparse")).reader().quantization
    assert quantization is not None
    # The first two layers keep values for the last two, which have none of their own.
    assert {name.rpartition(".")[2] for name in quantization.folded} == {"down_proj"}
    assert sum(name.endswith("o_proj") for name in quantization.runtime_permuted) == 4


def test_a_run_that_was_cut_off_goes_on_with_what_was_handed_on(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(directory, method="wanda+cp", reconstruction="obs")
    prune(recipe, tmp_path / "whole" / "sparse")
    original, passes = streamed_windows.run_windows, iter(range(9))

    def cut(*arguments: Any) -> Any:
        if next(passes, None) is None:  # each layer passes dense and pruned, of two texts
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(streamed_windows, "run_windows", cut)
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, tmp_path / "cut" / "sparse")
    monkeypatch.undo()
    prune(recipe, tmp_path / "cut" / "sparse")
    files = [tmp_path / run / "sparse" / "model.safetensors" for run in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_experts_beside_an_mlp(directory: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("gemma4_text", tie_word_embeddings=True, **GEMMA4_EXPERTS).save_pretrained(model)
    save_tokenizer(model)
    fuse_experts(model, "model.layers.{}.experts")
    recipe = recipe_of(directory, model=str(model), method="wanda+cp", reconstruction="obs")
    report = prune(recipe, tmp_path / "sparse")
    source = open_source(str(tmp_path / "sparse"))
    assert "model.layers.1.experts.3.up_proj" in source.reader().sparse_layers()
    written = load_model(source, torch.float32, torch.device("cpu"))
    windows = prepare(recipe).windows
    assert windows is not None
    found = perplexity(written, windows.held_out)
    assert found == pytest.approx(report.perplexity_after, rel=1e-4)


def test_conversion_and_back(directory: Path, tmp_path: Path) -> None:
    prune(recipe_of(directory, method="wanda+cp"), tmp_path / "sparse")
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    models = [
        load_model(open_source(str(tmp_path / name)), torch.float32, torch.device("cpu"))
        for name in ("sparse", "dense")
    ]
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        first, *others = (model(tokens).logits for model in models)
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


def test_the_forecast_counts_what_passes_beside_hidden_states(directory: Path) -> None:
    recipe = recipe_of(directory, method="wanda+cp", reconstruction="obs", evaluation_windows=0)
    prepared = prepare(recipe)
    plan, windows = prepared.plan, prepared.windows
    assert windows is not None
    assert plan.handed_on_channels == 2 * 64 + 2 * 128
    assert (plan.token_channels, plan.token_weights) == (4 * 32, 128 * 4 * 32)
    forecast = memory_forecast(recipe, prepared)
    kept = 3 * windows.calibration.numel() * (128 + plan.handed_on_channels)
    assert forecast.common == 4 * (kept + len(windows.calibration.unique()) * 4 * 32)
