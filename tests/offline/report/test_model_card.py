"""What a model card takes over from the base model's own."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from permllm_offline.model.loading import Source
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report.model_card import base_license, calibration_text, model_card
from permllm_offline.report.report import LayerReport, Report


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("license: mit", "mit"),
        ("license: mit\ndate: 2024-02-30", "unknown"),  # no such day, so nothing of it is read
        ("license: [mit", "unknown"),
        ("- mit", "unknown"),
        ("tags: [text]", "unknown"),
    ],
)
def test_the_licence_is_that_of_the_header(header: str, expected: str, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(f"---\n{header}\n---\n# Model\n", encoding="utf-8")
    assert base_license(tmp_path) == expected


def test_calibration_text_is_named_without_its_folders_even_when_it_is_gone(
    tmp_path: Path,
) -> None:
    names = ("c4", "a/b:train", str(tmp_path / "gone.txt"), str(tmp_path / "folder" / ".."))
    recipe = make_recipe({"model": "m", "num_samples": 8, "dataset": names})
    text = calibration_text(_report(recipe))
    assert text.endswith(f"tokens from `c4`, `a/b:train`, `gone.txt`, `{tmp_path.name}`")


def test_text_that_decides_nothing_is_no_calibration() -> None:
    given = {"model": "m", "method": "magnitude", "dataset": "text.txt"}
    assert calibration_text(_report(make_recipe(given))) == "none"
    assert "`text.txt`" in calibration_text(_report(make_recipe(given | {"values": "int8"})))


@pytest.mark.parametrize("rounding_error", [None, 0.01])
def test_perplexity_of_int8_values_leaves_activations_out(
    rounding_error: float | None, tmp_path: Path
) -> None:
    layer = LayerReport("q", 64, 64, "none", 0.0, 0.7, 8192, 4608, rounding_error)
    report = _report(make_recipe({"model": str(tmp_path)}), layer)
    language = SimpleNamespace(config=LlamaConfig())
    card = model_card(report, Source(str(tmp_path), tmp_path, language), "sparse")
    assert "calibration never saw" in card
    assert ("serving rounds them" in card) == (rounding_error is not None)


def _report(recipe: Recipe, *layers: LayerReport) -> Report:
    return Report(
        recipe=recipe,
        tool_version="0.1.0",
        perplexity_before=22.0,
        perplexity_after=49.0,
        learning_curve=[],
        reconstruction=[],
        reconstruction_curve=[],
        layers=list(layers),
    )
