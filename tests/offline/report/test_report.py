"""report.json is JSON whatever was measured."""

import json
import math
from pathlib import Path

import pytest

from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.report.report import Report


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    report = Report(
        recipe=make_recipe({"model": str(tmp_path), "method": "magnitude"}),
        tool_version="0.1.0",
        perplexity_before=22.5,
        perplexity_after=math.inf,
        learning_curve=[{"step": 0, "loss": -math.inf}],
        reconstruction=[LayerError("0", math.nan, 0.5)],
        reconstruction_curve=[],
        layers=[],
        output_errors=(0.25, math.nan),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Report, "byte_ratio", 0.5)
        found = json.loads(report.to_json(), parse_constant=refuse)
    assert (found["perplexity_before"], found["perplexity_after"]) == (22.5, None)
    assert found["learning_curve"] == [{"step": 0, "loss": None}]
    assert (found["reconstruction"][0]["before"], found["reconstruction"][0]["after"]) == (
        None,
        0.5,
    )
    assert found["output_errors"] == [0.25, None]
    assert found["byte_ratio"] == 0.5
