"""What no recipe can hold is named as the user wrote it, with the rule and the remedy."""

from argparse import SUPPRESS, _SubParsersAction
from typing import Any

import pytest

from permllm_offline.cli import build_parser, main
from permllm_offline.errors import OfflineError
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.refusals import option_of
from permllm_offline.recipe.schema import LearningRecipe, Recipe

REMEDY = "Give such a value, or leave it out."
MAPPING = "it should be a mapping of entries, as in recipe.yaml"
STRING = "it should be a valid string"


def message(given: dict[str, Any], recorded: dict[Any, Any] | None = None) -> str:
    with pytest.raises(OfflineError) as found:
        make_recipe({"model": "m", "method": "wanda", **given}, recorded=recorded)
    return str(found.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"num_samples": 0}, "--num-samples 0 cannot be used: it should be greater than or equal"),
        ({"learning": {"scope": "layer"}}, "learning.scope 'layer' cannot be used: it should be"),
        ({"learning": {"window": 0}}, "learning.window 0 cannot be used"),
        ({"learning": {"patience": -1}}, "learning.patience -1 cannot be used"),
        ({"learning": 5}, f"learning 5 cannot be used: {MAPPING}. {REMEDY}"),
        ({"distillation": "fast"}, f"distillation 'fast' cannot be used: {MAPPING}. {REMEDY}"),
        ({"blockwise": {"steps": 0}}, "blockwise.steps 0 cannot be used"),
        ({"dataset": 5}, f"--dataset 5 cannot be used: {STRING}. {REMEDY}"),
    ],
)
def test_an_option_or_an_argument(given: dict[str, Any], expected: str) -> None:
    assert message(given).startswith(expected)
    assert message(given).endswith(REMEDY)


def test_what_must_be_there_cannot_be_left_out() -> None:
    assert message({"model": 5}) == f"model 5 cannot be used: {STRING}. Give such a value."


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"seed": -1}, "seed -1 of the recipe file cannot be used: it should be greater"),
        ({"learning": {"scope": "x"}}, "learning.scope 'x' of the recipe file cannot be used"),
        ({"learning": 5}, f"learning 5 of the recipe file cannot be used: {MAPPING}"),
        ({"dataset": 2024}, f"dataset 2024 of the recipe file cannot be used: {STRING}"),
        ({"dataset": ["a", 3]}, f"dataset 3 of the recipe file cannot be used: {STRING}"),
    ],
)
def test_an_entry_of_the_recipe_file(recorded: dict[str, Any], expected: str) -> None:
    assert message({}, recorded).startswith(expected)


def test_an_option_comes_before_an_entry_of_the_file_in_the_message_too() -> None:
    both = message({"learning": {"steps": 0}}, {"learning": {"window": 1}})
    assert both.startswith("learning.steps 0 cannot")
    both = message({"learning": {"steps": 1}}, {"learning": {"window": 0}})
    assert both.startswith("learning.window 0 of the recipe file")


@pytest.mark.parametrize(
    ("recorded", "expected"),
    [
        ({"effort": "high"}, "effort: known are model, method, "),
        ({1: 1}, "1: known are model, method, "),
        ({"sed": 1}, "sed: did you mean seed? Known are model, method, "),
        ({"learning": {"typo": 1}}, "learning.typo: known are layers, scope, "),
        ({"learning": {1: 1}}, "learning.1: known are layers, scope, "),
        ({"distillation": {"layer_window": 1}}, "distillation.layer_window: did you mean layer_w"),
    ],
)
def test_what_is_no_entry(recorded: dict[Any, Any], expected: str) -> None:
    assert message({}, recorded).startswith(f"the recipe has no entry {expected}")


def test_a_recipe_without_a_model() -> None:
    with pytest.raises(OfflineError, match=r"^the recipe has no model: give it one\.$"):
        make_recipe({"method": "wanda"})


def test_every_option_that_is_named_exists_and_every_one_that_exists_is_named() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    options = {
        action.dest: action.option_strings[0]
        for action in commands.choices["prune"]._actions
        if action.option_strings and action.help != SUPPRESS
    }
    entries = [(name,) for name in Recipe.model_fields]
    entries += [("learning", name) for name in LearningRecipe.model_fields]
    for entry in entries:
        assert option_of(entry) == options.get(".".join(entry)), entry


@pytest.mark.parametrize("option", ["--steps", "--learn-layers=all", "--no-smoothing", "--resume"])
def test_an_option_that_is_none_any_more_says_what_takes_its_place(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["prune", "model", "--output", "out", option])
    remedy = "from unasked" if option == "--resume" else "into a YAML file, and give that with"
    assert remedy in capsys.readouterr().err


def test_every_constant_of_learning_had_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    for name, field in LearningRecipe.model_fields.items():
        for option in (f"--{name}", f"--learn-{name}"):
            with pytest.raises(SystemExit):
                main(["prune", "m", "--output", "o", option.replace("_", "-")])
        assert f"`learning: {{{name}: {field.default}}}`" in capsys.readouterr().err
