"""What a prune writes is counted before any work, and said where there is no room for it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from permllm_offline import pipeline
from permllm_offline.errors import OfflineError
from permllm_offline.forecast import room
from permllm_offline.forecast.memory import peak_bytes
from permllm_offline.preparation.prepared import prepare, prepare_model
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
        return room.disk_bytes(recipe, prepared) - prepared.plan.total_bytes, weights

    states = (10 + 6) * 24 * 128 * 4
    found, weights = needed(method="wanda", reconstruction="distillation")
    assert found == 2 * (3 * 4 + 4) * weights // 2 + states
    # A layer's finished weights are kept whole, masks only of what is pruned.
    whole, _ = needed(method="magnitude", evaluation_windows=0)
    ignored, fewer = needed(method="magnitude", evaluation_windows=0, ignore=[r"re:.*\.o_proj"])
    assert weights - fewer == 2 * 128 * 128
    assert whole - ignored == 2 * 128 * 128 // 8
    found, _ = needed(method="permllm-wanda")
    assert found == 10 * 24 * 128 * 4
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
    monkeypatch.setattr(room, "check_disk", lambda _, needed: asked.append(needed))
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
        room.check_room(recipe, prepared, tmp_path / "out", kept)
    weights = sum(linear.weights for linear in prepared.plan.linears)
    distils = f"The state of the distillation takes {16 * weights / 1e9:.3g} GB in all"
    assert (distils in str(caught.value)) == (method == "permllm-best")
    smaller = make_recipe(entries | {"method": "wanda+cp", "reconstruction": "obs+blockwise"})
    needs = (
        f"--method wanda+cp --reconstruction obs+blockwise{' --restart' if kept else ''} distils "
        f"nothing and may take {room.disk_bytes(smaller, prepared) / 1e9:.3g} GB"
    )
    assert (needs in str(caught.value)) == (method == "permllm-best")


SIZES: dict[str, Any] = {"num_samples": 10, "sequence_length": 20, "evaluation_windows": 0}
SMALLER = {"method": "wanda+cp", "reconstruction": "obs+blockwise"}
Check = Callable[..., None]


@pytest.fixture
def check(tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Check a recipe on a machine with the memory that it needs, or another does, or less."""

    def check(
        *, less: int = 0, taken: int = 0, into: dict[str, Any] | None = None, **options: Any
    ) -> None:
        entries = {"model": str(tiny_model_directory), "dataset": str(text_file)} | SIZES
        recipe = make_recipe(entries | options)
        prepared = prepare(recipe)
        enough = recipe if into is None else make_recipe(entries | into)
        memory = room.PROGRAM_BYTES + peak_bytes(enough, prepared) - less
        monkeypatch.setattr(room, "memory_bytes", lambda _: memory)
        monkeypatch.setattr(room, "free_bytes", lambda: memory - taken)
        room.check_memory(recipe, prepared)

    return check


def test_what_fits_is_pruned_without_a_word(check: Check, caplog: pytest.LogCaptureFixture) -> None:
    check()
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("options", "into", "remedy"),
    [
        ({}, SMALLER, r"give --method wanda\+cp --reconstruction obs\+blockwise, which needs"),
        ({}, {"method": "wanda+cp"}, r"give --method wanda\+cp, which needs about .* GB\."),
        ({"method": "sparsegpt"}, {"method": "magnitude"}, "give --method magnitude, which needs"),
        ({"method": "magnitude"}, None, "give fewer --num-samples, .* a larger machine"),
    ],
)
def test_what_does_not_fit_is_refused_and_names_what_does(
    options: dict[str, Any], into: dict[str, Any] | None, remedy: str, check: Check
) -> None:
    less = 1 if into is None else 0
    with pytest.raises(OfflineError, match=f"needs about .* and this machine has .*: {remedy}"):
        check(less=less, into=into, **options)


def test_memory_that_other_programs_hold_is_a_warning(
    check: Check, caplog: pytest.LogCaptureFixture
) -> None:
    check(taken=1)
    (said,) = caplog.messages
    assert "and other programs leave" in said
    assert "or give --method wanda+cp --reconstruction obs+blockwise" in said
