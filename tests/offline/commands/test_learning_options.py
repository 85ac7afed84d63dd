"""Each constant of the learned permutation, from its option to the recipe."""

from typing import Any

import pytest

from permllm_offline.cli import build_parser
from permllm_offline.commands.learning_options import given_learning
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import LearningRecipe

GIVEN: dict[str, tuple[str, Any]] = {
    "layers": ("--learn-layers", "last:1"),
    "scope": ("--learn-scope", "window"),
    "window": ("--learn-window", 3),
    "steps": ("--steps", 7),
    "windows_per_step": ("--windows-per-step", 5),
    "learning_rate": ("--learning-rate", 0.025),
    "weight_decay": ("--weight-decay", 0.5),
    "initial": ("--initial", "random"),
    "initial_logit": ("--initial-logit", 2.5),
    "windows_at_once": ("--windows-at-once", 4),
    "temperature_start": ("--temperature-start", 1.5),
    "temperature_end": ("--temperature-end", 0.375),
    "sinkhorn_iterations": ("--sinkhorn-iterations", 9),
    "gradient_checkpointing": ("--gradient-checkpointing", "never"),
    "validation_windows": ("--validation-windows", 6),
    "validation_interval": ("--validation-interval", 11),
    "patience": ("--patience", 2),
}


def learning(*arguments: str) -> dict[str, Any]:
    options = build_parser().parse_args(["prune", "model", "--output", "out", *arguments])
    return given_learning(options)


def test_every_constant_has_an_option() -> None:
    assert GIVEN.keys() == LearningRecipe.model_fields.keys()
    assert learning() == {}


@pytest.mark.parametrize("field", GIVEN)
def test_an_option_sets_its_constant_alone(field: str) -> None:
    option, value = GIVEN[field]
    default = LearningRecipe.model_fields[field].default
    assert value != default
    found = learning(option, str(value))
    assert found == {field: value}
    assert type(found[field]) is type(default)
    made = make_recipe({"model": "model", "learning": found}).learning
    assert made.model_dump() == LearningRecipe().model_dump() | {field: value}


def test_zero_is_given_too() -> None:
    fields = ("weight_decay", "sinkhorn_iterations", "patience")
    options = [word for field in fields for word in (GIVEN[field][0], "0")]
    assert learning(*options) == dict.fromkeys(fields, 0)
