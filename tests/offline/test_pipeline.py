"""What a prune checks before any work: disk and calibration windows."""

from pathlib import Path

import pytest

from permllm_offline import pipeline
from permllm_offline.errors import OfflineError
from permllm_offline.preparation import prepare_model
from permllm_offline.recipe import make_recipe


def test_the_disk_holds_two_states_of_what_is_unfinished(
    tiny_model_directory: Path, text_file: Path
) -> None:
    sizes = {"num_samples": 10, "sequence_length": 24, "distillation": {"self_windows": 6}}
    entries = {"model": str(tiny_model_directory), "dataset": str(text_file)} | sizes

    def needed(**options: object) -> tuple[int, int]:
        recipe = make_recipe(entries | options)
        prepared = prepare_model(recipe)
        weights = sum(
            linear.out_features * linear.layout.in_features for linear in prepared.plan.linears
        )
        return pipeline.disk_bytes(recipe, prepared) - prepared.plan.total_bytes, weights

    states = (10 + 6) * 24 * 128 * 4
    found, weights = needed(method="wanda", reconstruction="distillation")
    assert found == 2 * (3 * 4 + 4) * weights // 2 + 2 * states
    # A layer's finished weights are kept whole, masks only of what is pruned.
    whole, _ = needed(method="magnitude", evaluation_windows=0)
    ignored, fewer = needed(method="magnitude", evaluation_windows=0, ignore=[r"re:.*\.o_proj"])
    assert weights - fewer == 2 * 128 * 128
    assert whole - ignored == 2 * 128 * 128 // 8
    files, _ = needed(method="wanda", reconstruction="distillation", scratch="disk")
    assert files - found == (4 + 8 + 4 + 4 + 2) * weights // 2
    found, _ = needed(method="permllm-wanda")
    assert found == 2 * 10 * 24 * 128 * 4
    # Of a streamed model two files of hidden states: dense, and of held-out text pruned ones too,
    # of calibration text where layers learn.
    found, weights = needed(method="wanda")
    assert found == 4 * weights + weights // 8 + 2 * (10 + 2 * 8) * 24 * 128 * 4
    found, _ = needed(method="permllm-wanda", learning={"scope": "window"})
    assert found == 4 * weights + weights // 8 + 2 * (2 * 10 + 2 * 8) * 24 * 128 * 4


def test_what_lies_in_the_work_folder_needs_no_further_disk(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "check_disk", lambda _, needed: asked.append(needed))
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    pipeline.check_checkpoint(recipe, tmp_path / "out")
    work = tmp_path / ".out.work"
    work.mkdir()
    (work / "layer-0000.safetensors").write_bytes(bytes(1000))
    (work / "layer-0001-interval.partial").write_bytes(bytes(24))
    pipeline.check_checkpoint(recipe, tmp_path / "out")
    assert asked[0] - asked[1] == 1024


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
