import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.permutation.learned_layers import most_sensitive, parse_layers
from permllm_offline.preparation.recipe_input import make_recipe, overridden, read_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.recipe_lines import with_recipe


def test_a_recipe_file_gives_the_recipe_back(tmp_path: Path) -> None:
    recipe = make_recipe(
        {"model": "m", "method": "ria+cp", "dataset": ("a", "b"), "learning": {"steps": 7}}
    )
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert make_recipe(read_recipe(tmp_path / "recipe.yaml")) == recipe


def test_changes_reach_into_nested_entries_and_none_changes_nothing() -> None:
    entries = {"seed": 1, "learning": {"steps": 7, "learning_rate": 0.5}}
    changes = {"seed": None, "model": "m", "learning": {"steps": 9}}
    assert overridden(entries, changes) == {
        "seed": 1,
        "model": "m",
        "learning": {"steps": 9, "learning_rate": 0.5},
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read recipe"),
        ("b: 1\na: [", r"cannot read recipe .*: line 2: expected the node content"),
        ("- a", "holds list, not"),
    ],
)
def test_files_that_are_no_recipe_are_refused(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "recipe.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(OfflineError, match=message):
        read_recipe(file)


def test_a_pattern_written_by_hand_is_no_number_to_the_base_60(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "model: m\npattern: 4:8\nseed: 12\nlearning: {weight_decay: 0.25, steps: 0x10}\n"
    )
    entries = read_recipe(file)
    assert entries["pattern"] == "4:8"
    assert entries["learning"] == {"weight_decay": 0.25, "steps": 16}
    assert make_recipe(entries).parsed_pattern() == Pattern(4, 8)
    assert yaml.safe_load(file.read_text())["pattern"] == 248


RECORDED = make_recipe({"model": "m", "distillation": {"learning_rate": 0.5}}).model_dump()


@pytest.mark.parametrize(
    ("entries", "effort", "expected"),
    [
        ({}, None, (192, 300, 64)),
        ({}, "low", (96, 150, 32)),
        ({"num_samples": 7}, "low", (7, 150, 32)),
        ({"distillation": {"steps": 5, "self_windows": None}}, "high", (768, 5, 256)),
    ],
)
def test_an_effort_comes_between_the_options_and_the_recipe_file(
    entries: dict[str, Any], effort: str | None, expected: tuple[int, int, int]
) -> None:
    recipe = make_recipe(entries, effort, recorded=RECORDED)
    constants = recipe.distillation
    assert (recipe.num_samples, constants.steps, constants.self_windows) == expected
    assert constants.learning_rate == 0.5


def test_a_recipe_file_comes_before_the_default_effort() -> None:
    recorded = {"model": "m", "num_samples": 7, "distillation": {"steps": 9}}
    recipe = make_recipe({}, recorded=recorded)
    assert (recipe.num_samples, recipe.distillation.steps) == (7, 9)
    assert recipe.distillation.self_windows == 64


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ("wanda+cp", "obs+blockwise")),
        ({"reconstruction": "obs"}, ("wanda+cp", "obs")),
        ({"method": "permllm-best"}, ("permllm-best", None)),
        ({"method": "ria", "reconstruction": "obs"}, ("ria", "obs")),
    ],
)
def test_a_reconstruction_is_recorded_for_its_method(
    given: dict[str, str], expected: tuple[str, str | None]
) -> None:
    recorded = {"model": "m", "method": "wanda+cp", "reconstruction": "obs+blockwise"}
    recipe = make_recipe(given, recorded=recorded)
    assert (recipe.method, recipe.reconstruction) == expected
    assert recorded["reconstruction"] == "obs+blockwise"


def test_options_of_the_command_come_before_those_of_the_file(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    entries = {"method": "wanda", "dataset": str(text_file), "num_samples": 4}
    entries |= {"sequence_length": 16, "seed": 3, "model": "elsewhere"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    options = ("--recipe", str(tmp_path / "mine.yaml"), "--seed", "5", "--method", "wanda+cp")
    assert (
        main(["prune", str(tiny_model_directory), "--output", str(tmp_path / "o"), *options]) == 0
    )
    used = Recipe.model_validate(yaml.safe_load((tmp_path / "o" / "recipe.yaml").read_text()))
    assert (used.method, used.seed, used.num_samples) == ("wanda+cp", 5, 4)
    assert used.model == str(tiny_model_directory)


def test_several_sources_are_named_on_the_card(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    (tmp_path / "other.txt").write_text(text_file.read_text(), encoding="utf-8")
    data = ("--dataset", str(text_file), "--dataset", str(tmp_path / "other.txt"))
    sizes = ("--method", "wanda", "--num-samples", "4", "--sequence-length", "16")
    output = tmp_path / "sparse"
    arguments = ["prune", str(tiny_model_directory), "--output", str(output), *data, *sizes]
    recipe = with_recipe(tmp_path / "recipe.yaml", {"sampling": "document"})
    assert main([*arguments, *recipe]) == 0
    assert "`calibration.txt`, `other.txt`" in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("other", "samples", "message"),
    [("calibration.txt", "4", "both read"), ("self", "1", "cannot be shared by 2 data sets")],
)
def test_sources_that_cannot_share_the_windows_are_refused(
    other: str,
    samples: str,
    message: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(text_file.parent)
    data = ("--dataset", str(text_file), "--dataset", other, "--num-samples", samples)
    arguments = ["prune", str(tiny_model_directory), "--output", str(tmp_path / "sparse")]
    assert main([*arguments, *data, "--method", "wanda", "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_options_come_before_the_recipe_and_the_recipe_before_the_preset(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    learning = {"steps": 3, "patience": 9, "windows_per_step": 2, "validation_windows": 2}
    entries = {"preset": "paper", "sequence_length": 20, "num_samples": 6}
    entries["learning"] = learning | {"layers": "last:1"}
    options = with_recipe(tmp_path / "mine.yaml", entries)
    options += ("--dataset", str(text_file), "--sequence-length", "16")
    output = tmp_path / "o"
    assert main(["prune", str(tiny_model_directory), "--output", str(output), *options]) == 0
    used = Recipe.model_validate(yaml.safe_load((output / "recipe.yaml").read_text()))
    assert (used.learning.steps, used.learning.patience, used.sequence_length) == (3, 9, 16)
    assert (used.learning.initial, used.learning.layers) == ("random", "last:1")
    assert used.sampling == "document"
    report = json.loads((output / "report.json").read_text())
    assert report["learned_layers"] == [1]
    assert report["sensitivities"] is None


def test_constants_of_the_paper() -> None:
    recipe = make_recipe({"model": "m"}, preset_name="paper")
    assert recipe.model_dump(exclude={"blockwise", "distillation", "learning"}) == {
        "model": "m",
        "method": "permllm-wanda",
        "reconstruction": None,
        "ignore": (),
        "pattern": "2:4",
        "block_size": 64,
        "dataset": "c4",
        "text_field": "text",
        "num_samples": 128 + 4,
        "sampling": "document",
        "sequence_length": 1024,
        "evaluation_windows": 8,
        "seed": 0,
        "device": "cpu",
        "dtype": "auto",
        "values": "auto",
        "smoothing": True,
    }
    assert recipe.learning.model_dump() == {
        "layers": "all",
        "scope": "model",
        "window": 1,
        "steps": 50 * 128 // 16,
        "windows_per_step": 16,
        "learning_rate": 1e-3 * 64**0.5,
        "weight_decay": 0.1 / 64**0.5,
        "initial": "random",
        "initial_logit": 1.0,
        "windows_at_once": 2,
        "temperature_start": 1.0,
        "temperature_end": 0.1,
        "sinkhorn_iterations": 5,
        "gradient_checkpointing": "auto",
        "validation_windows": 4,
        "validation_interval": 10,
        "patience": 0,
    }


def test_the_rate_of_the_paper_depends_on_the_importance() -> None:
    rates = {
        method: make_recipe(
            {"model": "m", "method": method}, preset_name="paper"
        ).learning.learning_rate
        for method in ("permllm-wanda", "permllm-ria")
    }
    assert rates == pytest.approx({"permllm-wanda": 0.008, "permllm-ria": 0.04})
    with pytest.raises(OfflineError, match=r"preset 'other' is not known: give one of paper"):
        make_recipe({"model": "m"}, preset_name="other")


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_seed_that_no_generator_takes_is_refused(seed: int) -> None:
    with pytest.raises(OfflineError, match=f"^--seed {seed}"):
        make_recipe({"model": "m", "seed": seed})
    assert make_recipe({"model": "m", "seed": 2**32 - 1}).seed == 2**32 - 1


@pytest.mark.parametrize("preset_name", [None, "paper"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"method": "best", "reconstruction": "none"}, "method 'best' is not known"),
        ({"method": 5}, "method 5 is not known"),
        ({"method": ["wanda"]}, r"method \['wanda'\] is not known"),
        ({"method": "wanda", "reconstruction": "more"}, "reconstruction 'more' is not known"),
        ({"reconstruction": ["obs"]}, r"reconstruction \['obs'\] is not known"),
    ],
)
def test_a_part_that_is_not_known_is_refused(
    entries: dict[str, object], message: str, preset_name: str | None
) -> None:
    with pytest.raises(OfflineError, match=f"^{message}: give one of "):
        make_recipe({"model": "m", **entries}, preset_name=preset_name)
    with pytest.raises(OfflineError, match=f"^{message}: give one of "):
        make_recipe({"model": "m"}, preset_name=preset_name, recorded=entries)


def test_a_reconstruction_that_distils_has_the_effort_whatever_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RECONSTRUCTIONS, "another", RECONSTRUCTIONS["obs+distillation"])
    entries = {"model": "m", "method": "wanda", "reconstruction": "another"}
    assert make_recipe(entries, "high").num_samples == 768


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [0, 1, 2, 3]),
        ("last:3", [1, 2, 3]),
        ("spread:1", [2]),
        ("spread:2", [1, 3]),
        ("spread:4", [0, 1, 2, 3]),
        ("3,0,1-2", [0, 1, 2, 3]),
        ("2", [2]),
    ],
)
def test_layers_that_learn(text: str, layers: list[int]) -> None:
    assert list(parse_layers(text, 4).layers) == layers


def test_layers_lie_spread_over_the_model() -> None:
    assert list(parse_layers("spread:6", 30).layers) == [2, 7, 12, 17, 22, 27]


def test_layers_that_are_measured() -> None:
    assert parse_layers("auto:2", 4).most_sensitive == 2
    assert most_sensitive([0.1, 0.4, 0.2, 0.4], 2) == [1, 3]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("all", [1, 2, 4, 6]),
        ("last:3", [2, 4, 6]),
        ("spread:2", [2, 6]),
        ("0-3,6", [1, 2, 6]),
        ("auto:4", []),
    ],
)
def test_layers_that_are_left_dense_are_passed_over(text: str, layers: list[int]) -> None:
    assert list(parse_layers(text, 7, [1, 2, 4, 6]).layers) == layers


@pytest.mark.parametrize("text", ["last:5", "auto:5", "3", "1,5", "0,1"])
def test_layers_that_are_left_dense_cannot_learn(text: str) -> None:
    with pytest.raises(
        OfflineError, match=r"learning\.layers.*(not left dense|nothing of [035] is)"
    ):
        parse_layers(text, 7, [1, 2, 4, 6])


def test_the_most_sensitive_are_taken_from_those_that_are_pruned() -> None:
    assert most_sensitive([0.9, 0.1, 0.4, 0.2, 0.4], 2, [1, 2, 3]) == [2, 3]


@pytest.mark.parametrize(
    "text", ["last:5", "auto:0", "spread:5", "4", "2-1", "0-4", "first", "", "1,,2"]
)
def test_layers_that_cannot_learn_are_refused(text: str) -> None:
    with pytest.raises(OfflineError, match=r"learning\.layers.*(4 decoder|all, spread:N|0 to 3)"):
        parse_layers(text, 4)
