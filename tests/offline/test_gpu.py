"""Pruning on a GPU, against pruning on the CPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHORT = ("--num-samples", "12", "--sequence-length", "16")
RECIPE = {
    "learning": {"steps": 2},
    "distillation": {"steps": 20, "self_windows": 0, "validation_interval": 10},
}
"""Without text that the model writes itself: a GPU draws other tokens from the same seed."""
TOLERANCES = {"retained importance": 1e-3, "perplexity": 1e-2, "errors": 1e-2, "int8 errors": 1e-2}
"""Relative. Both add in another order, and what is close to a tie may be decided otherwise: noise
of half a unit in the last place of all weights moves none by more than 1e-4 on the CPU."""


def prune(model: Path, output: Path, text: Path, *options: str) -> None:
    line = ["prune", str(model), "--output", str(output), "--dataset", str(text), *SHORT]
    assert main([*line, *options]) == 0


def numbers(checkpoint: Path) -> dict[str, list[float]]:
    """What the report of a prune says of its quality, by the names of the tolerances."""
    report: dict[str, Any] = json.loads((checkpoint / "report.json").read_text(encoding="utf-8"))
    layers, rounding = report["layers"], [layer["rounding_error"] for layer in report["layers"]]
    return {
        "retained importance": [layer["retained_importance"] for layer in layers],
        "perplexity": [report["perplexity_before"], report["perplexity_after"]],
        "errors": [
            *report["output_errors"],
            *(layer[when] for layer in report["reconstruction"] for when in ("before", "after")),
        ],
        "int8 errors": [error for error in rounding if error is not None],
    }


def require_alike(first: Path, second: Path) -> None:
    """Fail where two prunes are of another quality."""
    found, expected = numbers(first), numbers(second)
    for name, tolerance in TOLERANCES.items():
        assert found[name] == pytest.approx(expected[name], rel=tolerance), name


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "wanda+cp-lsa", "--values", "int8"),
        ("--method", "sparsegpt"),
        ("--method", "wanda+cp", "--reconstruction", "obs+blockwise"),
        ("--method", "permllm-wanda", "--reconstruction", "sparsegpt"),
        ("--method", "permllm-wanda", "--reconstruction", "distillation"),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_every_part_of_a_prune_is_as_good(
    options: tuple[str, ...], tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(RECIPE), encoding="utf-8")  # every JSON document is YAML
    for device in ("cpu", "cuda"):
        more = ("--recipe", str(recipe), "--device", device)
        prune(tiny_model_directory, tmp_path / device, text_file, *options, *more)
        assert validate(tmp_path / device) == []
    require_alike(tmp_path / "cuda", tmp_path / "cpu")


def test_a_model_writes_text_of_its_own(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    method = ("--method", "wanda", "--reconstruction", "distillation", "--effort", "low")
    prune(tiny_model_directory, tmp_path / "sparse", text_file, *method, "--device", "cuda")
    assert validate(tmp_path / "sparse") == []
    report = json.loads((tmp_path / "sparse" / "report.json").read_text(encoding="utf-8"))
    assert report["calibration"]["own_windows"] > 0


def test_the_same_weights_are_kept(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    for device in ("cpu", "cuda"):
        options = ("--method", "magnitude", "--device", device)
        prune(tiny_model_directory, tmp_path / device, text_file, *options)
    first, second = (tmp_path / device / "model.safetensors" for device in ("cpu", "cuda"))
    assert first.read_bytes() == second.read_bytes()
