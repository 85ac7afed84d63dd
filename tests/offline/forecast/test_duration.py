import itertools
from pathlib import Path
from typing import Any, Literal

import pytest

from permllm_offline.cli import main
from permllm_offline.forecast.duration import Forecast, Speed, forecast, measured_speed
from permllm_offline.permutation.learned_layers import trained_share
from permllm_offline.pipeline import rehearse
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import LearningRecipe, Recipe
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.text import own_text
from permllm_vllm.checkpoint.shard import Shard
from tests.offline.recipe_lines import with_recipe
from tests.offline.tiny_models import save_tokenizer, tiny_model

WEIGHTS = 128 * 128 * 2 + 64 * 128 * 2 + 128 * 192 * 3
"""Of one decoder layer of the tiny model: q and o, k and v, gate and up and down."""

SPEED = Speed(forward=1e6, training=1e6 / 3)


def small_recipe(model: Path, text: Path, **options: Any) -> Recipe:
    """A recipe that reads 200 tokens; ``options`` go before."""
    entries = {"dataset": str(text), "num_samples": 10, "sequence_length": 20}
    return make_recipe(entries | {"model": str(model), "evaluation_windows": 0} | options)


@pytest.fixture
def expect(tiny_model_directory: Path, text_file: Path) -> Any:
    def expect(**options: Any) -> Forecast:
        recipe = small_recipe(tiny_model_directory, text_file, **options)
        return forecast(recipe, prepare(recipe), speed=SPEED)

    return expect


def test_one_pass_of_the_calibration_text(expect: Any) -> None:
    found = expect(method="wanda")
    assert found.layer_seconds == pytest.approx([2 * 200 * WEIGHTS / 1e6] * 2)
    assert found.stage_seconds == {}
    assert expect(method="magnitude").seconds == 0


def test_held_out_windows_pass_dense_and_pruned(expect: Any) -> None:
    more = expect(method="magnitude", evaluation_windows=5)
    assert more.layer_seconds == pytest.approx([2 * 2 * 100 * WEIGHTS / 1e6] * 2)


def test_updates_of_layers_take_longer(expect: Any) -> None:
    wanda = expect(method="wanda")
    assert expect(method="sparsegpt").seconds > 3 * wanda.seconds
    obs = expect(method="wanda", reconstruction="obs")
    limited = {"layer_windows": 4, "self_windows": 0}
    first = expect(method="wanda", reconstruction="obs+distillation", distillation=limited)
    assert sum(first.layer_seconds) < sum(obs.layer_seconds)


def test_updates_of_experts_take_as_long_under_any_name(tmp_path: Path, text_file: Path) -> None:
    """Mixtral's checkpoints have other names for them than Transformers."""
    sizes = {"num_experts_per_tok": 2, "head_dim": 32}
    models = {
        "mixtral": {"num_local_experts": 4, "intermediate_size": 64},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 64, "mlp_only_layers": []},
    }
    found = []
    for model_type, own in models.items():
        folder = tmp_path / model_type
        tiny_model(model_type, **sizes, **own).save_pretrained(folder)
        save_tokenizer(folder)
        recipe = small_recipe(folder, text_file, method="sparsegpt")
        found.append(forecast(recipe, prepare(recipe), speed=SPEED).seconds)
    assert found[0] == pytest.approx(found[1])


def test_tuning_layer_by_layer(expect: Any) -> None:
    constants = {"steps": 7, "windows_per_step": 2, "validation_windows": 3}
    tuned = expect(
        method="wanda", reconstruction="blockwise", blockwise=constants | {"validation_interval": 5}
    )
    # A dense and a pruned pass; 14 windows forward and backward; 3 validations of 3 windows.
    tokens = 200 + 200 + (3 * 14 + 3 * 3) * 20
    assert tuned.layer_seconds == pytest.approx([2 * tokens * WEIGHTS / 1e6] * 2)
    assert tuned.stage_seconds == {}
    both = expect(method="wanda", reconstruction="obs+blockwise", blockwise=constants)
    assert both.seconds > tuned.seconds


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_a_reconstruction_is_forecast_by_what_it_does_not_by_its_name(
    name: str, expect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECONSTRUCTIONS, "another", RECONSTRUCTIONS[name])
    expected = expect(method="wanda", reconstruction=name)
    assert expect(method="wanda", reconstruction="another") == expected


def test_learning_the_permutations(expect: Any) -> None:
    constants = {"steps": 10, "windows_per_step": 2, "validation_windows": 3}
    found = expect(method="permllm-wanda", learning=constants | {"validation_interval": 4})
    tokens = (3 * 20 + 4 * 3) * 20
    expected = 2 * tokens * 2 * WEIGHTS / 1e6
    assert found.stage_seconds == {"learning": pytest.approx(expected)}
    assert found.layer_seconds == expect(method="wanda").layer_seconds


@pytest.mark.parametrize(
    ("layers", "scope", "share"),
    [("auto:1", "model", 3 / 4), ("auto:2", "model", 1), ("auto:1", "window", 1 / 2)],
)
def test_layers_chosen_by_their_sensitivity(
    expect: Any, layers: str, scope: str, share: float
) -> None:
    constants = {"layers": layers, "scope": scope, "window": 1, "validation_windows": 3}
    found = expect(method="permllm-wanda", learning=constants)
    # Each of the two layers alone, those behind it, and the dense one: 3 + 2 passes of 4 windows.
    measured = 2 * 4 * 20 * (3 + 2) * WEIGHTS / 1e6
    learning = expect(method="permllm-wanda", learning={"validation_windows": 3}).stage_seconds
    assert found.stage_seconds == {
        "sensitivity": pytest.approx(measured),
        "learning": pytest.approx(share * learning["learning"]),
    }


@pytest.mark.parametrize(("number", "scope"), [(1, "model"), (3, "model"), (2, "window")])
def test_a_mean_over_all_choices_of_layers(number: int, scope: Literal["model", "window"]) -> None:
    chosen = [
        ",".join(map(str, layers)) for layers in itertools.combinations(range(7), number)
    ]  # of seven layers
    shares = [trained_share(LearningRecipe(layers=one, scope=scope), 7) for one in chosen]
    mean = sum(shares) / len(shares)
    auto = LearningRecipe(layers=f"auto:{number}", scope=scope)
    assert trained_share(auto, 7) == pytest.approx(mean)


FIRST_LAYER, EVERY_DOWN = r"re:.*\.layers\.0\..*", r"re:.*\.down_proj"


@pytest.mark.parametrize("method", ["wanda", "permllm-best"])
def test_text_passes_what_is_left_dense_too(expect: Any, method: str) -> None:
    constants = {"validation_windows": 3}
    for reconstruction in (None, "distillation"):
        options = {"method": method, "reconstruction": reconstruction, "learning": constants}
        dense = expect(**options, ignore=[FIRST_LAYER])
        assert dense.layer_seconds == expect(**options).layer_seconds
        assert dense.stage_seconds == expect(**options).stage_seconds


def test_nothing_is_updated_or_tuned_of_what_is_left_dense(expect: Any) -> None:
    options = {"method": "wanda", "reconstruction": "obs+blockwise"}
    constants = {"steps": 7, "validation_windows": 3}
    whole = expect(**options, blockwise=constants).layer_seconds
    # The text passes it densely and once more, fed by what is pruned.
    first, second = expect(**options, blockwise=constants, ignore=[FIRST_LAYER]).layer_seconds
    assert (first, second) == (pytest.approx(2 * 2 * 200 * WEIGHTS / 1e6), whole[1])
    # Without down, one moment of 192 channels less, and no updates of its rows.
    update = 2 * 200 * 192**2 + 3 * 192**3 + 128 * 192**2
    fewer = expect(**options, blockwise=constants, ignore=[EVERY_DOWN]).layer_seconds
    assert fewer == pytest.approx([one - update / 1e6 for one in whole])


@pytest.mark.parametrize(("number", "scope"), [(1, "model"), (3, "model"), (2, "window")])
def test_a_mean_over_the_choices_of_layers_that_are_pruned(
    number: int, scope: Literal["model", "window"]
) -> None:
    pruned = [1, 2, 4, 6]
    chosen = [",".join(map(str, layers)) for layers in itertools.combinations(pruned, number)]
    shares = [trained_share(LearningRecipe(layers=one, scope=scope), 7, pruned) for one in chosen]
    auto = LearningRecipe(layers=f"auto:{number}", scope=scope)
    assert trained_share(auto, 7, pruned) == pytest.approx(sum(shares) / len(shares))


def test_a_dry_run_says_what_cannot_be_known(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--method", "permllm-wanda", "--sequence-length", "20", "--num-samples", "8"]
    arguments += ["--dataset", str(text_file), "--output", str(tmp_path / "o"), "--dry-run"]
    said = []
    for layers in ("auto:1", "last:1"):
        options = ["prune", str(tiny_model_directory), *arguments]
        options += with_recipe(tmp_path / "recipe.yaml", {"learning": {"layers": layers}})
        assert main(options) == 0
        said.append(" ".join(capsys.readouterr().out.split()))
    assert "s for sensitivity, " in said[0]
    assert "which layers auto:1 takes is known after sensitivity" in said[0]
    assert "sensitivity" not in said[1]


def test_distillation_samples_text_and_runs_the_head(expect: Any) -> None:
    constants = {"steps": 8, "validation_windows": 2, "validation_interval": 8, "self_windows": 5}
    found = expect(method="wanda", reconstruction="distillation", distillation=constants)
    head = 64 * 128
    sampled = 2 * 5 * 20 * (2 * WEIGHTS + head) / 1e6
    steps = 2 * 20 * ((3 * 8 + 4) * 2 * WEIGHTS + 3 * (8 + 4) * head) / 1e6
    assert found.stage_seconds == {
        "sampling text": pytest.approx(sampled),
        "distillation": pytest.approx(steps),
    }
    # The sampled windows are calibrated on too.
    assert found.layer_seconds == pytest.approx([2 * 300 * WEIGHTS / 1e6] * 2)
    assert found.seconds == pytest.approx(sampled + steps + sum(found.layer_seconds))


def sampling_seconds(windows: int) -> Any:
    """Of windows of 20 tokens."""
    return pytest.approx(2 * windows * 20 * (2 * WEIGHTS + 64 * 128) / 1e6)


def test_text_of_the_model_itself_is_sampled_once(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    own: dict[str, Any] = {"dataset": "self", "method": "wanda", "evaluation_windows": 3}
    recipe = small_recipe(tiny_model_directory, text_file, **own)
    _, prepared = rehearse(recipe, tmp_path / "output")
    assert prepared.windows is not None
    assert prepared.windows.calibration.shape == (10, 20)
    assert prepared.windows.held_out.shape == (3, 20)
    to_come = forecast(recipe, prepared, speed=SPEED)
    assert to_come.stage_seconds == {"sampling text": sampling_seconds(13)}
    written = forecast(recipe, prepare(recipe), speed=SPEED)
    assert written.stage_seconds == {}
    assert written.layer_seconds == to_come.layer_seconds
    distils = {"reconstruction": "distillation", "distillation": {"self_windows": 4}}
    half = {"dataset": ("self", str(text_file)), "num_samples": 11, "evaluation_windows": 3}
    shared = small_recipe(tiny_model_directory, text_file, **own | distils | half)
    _, prepared = rehearse(shared, tmp_path / "output")
    found = forecast(shared, prepared, speed=SPEED).stage_seconds
    assert found["sampling text"] == sampling_seconds(6 + 2 + 4)


def test_nothing_is_sampled_without_windows_of_its_own(expect: Any) -> None:
    found = expect(method="permllm-best", distillation={"self_windows": 0})
    assert list(found.stage_seconds) == ["distillation"]


def test_a_method_that_takes_steps_has_them_timed(
    tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[float] = []
    original = KeptWeights.step

    def counted(self: KeptWeights, rate: float) -> None:
        steps.append(rate)
        original(self, rate)

    monkeypatch.setattr(KeptWeights, "step", counted)
    for method, timed in (("wanda", False), ("permllm-best", True)):
        recipe = small_recipe(tiny_model_directory, text_file, method=method)
        assert forecast(recipe, prepare(recipe)).seconds > 0
        assert bool(steps) == timed


def test_the_speed_is_measured(tiny_model_directory: Path) -> None:
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    prepared = prepare(recipe)
    assert measured_speed(prepared, prepared.plan.linears[0]) > 0


def test_a_dry_run_samples_no_text_and_reads_no_weight(
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(own_text, "load_model")
    monkeypatch.delattr(own_text, "sample_text")
    read: list[object] = []
    monkeypatch.setattr(Shard, "_read", lambda *place: read.append(place))
    options = ("--method", "wanda", "--dataset", "self", "--sequence-length", "20", "--dry-run")
    assert (
        main(["prune", str(tiny_model_directory), "--output", str(tmp_path / "o"), *options]) == 0
    )
    assert "for sampling text" in capsys.readouterr().out
    assert read == []
    assert not (tmp_path / "cache").exists()


def test_a_dry_run_says_it(
    tmp_path: Path,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--method", "magnitude", "--dry-run")
    assert (
        main(["prune", str(tiny_model_directory), "--output", str(tmp_path / "o"), *options]) == 0
    )
    shown = capsys.readouterr().out
    assert "for decoder layers one by one (estimates" in shown
    assert "layer takes" in shown
    rows = [line.split("│")[1:-1] for line in shown.splitlines() if "_proj" in line]
    first = ["q_proj" in row[0] for row in rows]
    assert [row[-2].strip().endswith(" s") for row in rows] == first
    # The layer in float32, packed masks, and what the rows of its largest linear take.
    held = f"{(4 * WEIGHTS + WEIGHTS // 8 + 24 * 128 * 192) / 1e6:.1f} MB"
    assert [row[-1].strip() for row in rows] == [held if one else "" for one in first]
    assert sum(first) == 2
    assert "peak memory about 0.00 GB beside the program: 0.00 GB and what a decoder" in shown
