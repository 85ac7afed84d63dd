"""What a prune checks before any work: calibration windows."""

from pathlib import Path

import pytest

from permllm_offline import pipeline
from permllm_offline.errors import OfflineError
from permllm_offline.preparation.recipe_input import make_recipe


@pytest.mark.parametrize(
    ("options", "too_few"),
    [
        ({"method": "permllm-wanda", "num_samples": 6}, "5 calibration windows .* to learn from"),
        (
            {"method": "permllm-wanda", "learning": {"scope": "window"}, "num_samples": 6},
            "5 calibration windows .* to learn from",
        ),
        (
            {"method": "wanda", "reconstruction": "blockwise", "num_samples": 6},
            "5 calibration windows .* to tune a layer",
        ),
        (
            {"num_samples": 2, "distillation": {"self_windows": 3}, "method": "permllm-best"},
            "4 calibration windows .* to distil from",
        ),
    ],
)
def test_too_few_windows_are_refused_before_any_work(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    options: dict[str, object],
    too_few: str,
) -> None:
    sizes = {"model": str(tiny_model_directory), "dataset": str(text_file), "sequence_length": 24}
    enough = make_recipe(sizes | options)
    pipeline.check_checkpoint(enough, tmp_path / "out")
    fewer = enough.model_copy(update={"num_samples": enough.num_samples - 1})
    with pytest.raises(OfflineError, match=too_few):
        pipeline.check_checkpoint(fewer, tmp_path / "out")


def test_a_step_of_several_processes_needs_a_window_for_each(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = make_recipe(
        {
            "model": str(tiny_model_directory),
            "method": "permllm-best",
            "dataset": str(text_file),
            "num_samples": 5,
            "distillation": {"self_windows": 2},
        }
    )
    monkeypatch.setattr(pipeline, "count", lambda: 3)
    pipeline.check_checkpoint(recipe, tmp_path / "out")
    monkeypatch.setattr(pipeline, "count", lambda: 4)
    with pytest.raises(OfflineError, match=r"7 calibration windows .* a step takes 4 and 4 are"):
        pipeline.check_checkpoint(recipe, tmp_path / "out")
