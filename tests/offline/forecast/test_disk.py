"""What a prune writes is counted before any work, and said where there is no room for it."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from permllm_offline import pipeline
from permllm_offline.forecast import disk as disk_forecast
from permllm_offline.preparation.prepared import prepare_model
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.resume import work_folder
from permllm_offline.run.steps import Step
from permllm_vllm.checkpoint.errors import CheckpointError


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
        return disk_forecast.disk_bytes(recipe, prepared) - prepared.plan.total_bytes, weights

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
    monkeypatch.setattr(disk_forecast, "check_disk", lambda _, needed: asked.append(needed))
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    pipeline.check_checkpoint(recipe, tmp_path / "out")
    with work_folder(recipe, prepare_model(recipe), tmp_path / "out") as work:
        work.step("layer-0000", Step)
    size = (work.directory / "layer-0000.safetensors").stat().st_size
    (work.directory / "layer-0001-interval.partial").write_bytes(bytes(24))
    pipeline.check_checkpoint(recipe, tmp_path / "out")
    assert asked[0] - asked[1] == size + 24
    # Steps that the prune is refused for take their room beside it, unless they are removed.
    other = recipe.model_copy(update={"seed": 1})
    pipeline.check_checkpoint(other, tmp_path / "out")
    assert asked[2] == asked[0]
    pipeline.check_checkpoint(other, tmp_path / "out", restart=True)
    assert asked[3] == asked[1]


@pytest.mark.parametrize("method", ["permllm-best", "wanda+cp"])
@pytest.mark.parametrize("kept", [0, 10])
def test_a_full_disk_says_what_a_distillation_keeps_there_and_what_needs_less(
    kept: int,
    method: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entries = {"model": str(tiny_model_directory), "dataset": str(text_file), "num_samples": 9}
    recipe = make_recipe(entries | {"method": method})
    prepared = prepare_model(recipe)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(CheckpointError, match="what is written may take") as caught:
        disk_forecast.check_room(recipe, prepared, tmp_path / "out", kept)
    weights = sum(linear.weights for linear in prepared.plan.linears)
    distils = f"The state of the distillation takes {16 * weights / 1e9:.3g} GB in all"
    assert (distils in str(caught.value)) == (method == "permllm-best")
    smaller = make_recipe(entries | {"method": "wanda+cp", "reconstruction": "obs+blockwise"})
    needs = (
        f"--method wanda+cp --reconstruction obs+blockwise{' --restart' if kept else ''} distils "
        f"nothing and may take {disk_forecast.disk_bytes(smaller, prepared) / 1e9:.3g} GB"
    )
    assert (needs in str(caught.value)) == (method == "permllm-best")
