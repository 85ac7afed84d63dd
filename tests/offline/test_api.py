"""The functions, and the page that documents them, as they are."""

import inspect
import re
import subprocess
import sys
from argparse import SUPPRESS, _SubParsersAction
from pathlib import Path
from typing import get_args, get_type_hints, is_typeddict

import pytest

import permllm_offline
from permllm_offline.cli import build_parser
from permllm_offline.errors import OfflineError
from permllm_offline.recipe.schema import Recipe
from tests.offline.tiny_models import random_text

PAGE = Path(__file__).parents[2] / "docs" / "offline-api.md"


def test_the_documented_example_runs(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "SmolLM2-135M-Instruct").symlink_to(tiny_model_directory)
    (tmp_path / "calibration.txt").symlink_to(text_file)
    (tmp_path / "held-out.txt").write_text(random_text(300, seed=2), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, str(PAGE), "exec"), {})
    shown = capsys.readouterr().out
    assert "53% of the bytes" in shown
    assert "model.layers.0.self_attn.q_proj run time" in shown
    assert re.search(r"perplexity [\d.]+ over 4 windows", shown)


def options_of(command: str) -> set[str]:
    """The options of a sub-command."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    shown = (a for a in commands.choices[command]._actions if a.help != SUPPRESS)
    return {action.dest for action in shown} - {"help", "verbose"}


def test_the_arguments_of_prune_are_the_recipe_and_the_options_of_the_command() -> None:
    parameters = inspect.signature(permllm_offline.prune).parameters
    assert set(Recipe.model_fields) <= set(parameters)
    # A dry run shows a table; `forecast` and `prepare` are its functions.
    options = options_of("prune") - {"dry_run"}
    assert options < set(parameters)
    assert set(parameters) - options - set(Recipe.model_fields) == {"preset"}
    # None leaves the choice to the recipe file, so nothing else may be a default.
    assert all(
        parameters[name].default in (None, inspect.Parameter.empty) for name in Recipe.model_fields
    )


@pytest.mark.parametrize("name", ["learning", "blockwise", "distillation"])
def test_the_constants_are_typed_as_the_recipe_has_them(name: str) -> None:
    constants = Recipe.model_fields[name].annotation
    assert constants is not None
    expected = {field: info.annotation for field, info in constants.model_fields.items()}
    entries, nothing = get_args(get_type_hints(permllm_offline.prune)[name])
    assert nothing is type(None)
    assert is_typeddict(entries)
    assert get_type_hints(entries) == expected
    assert entries.__required_keys__ == frozenset()


def test_the_arguments_of_evaluate_are_the_options_of_the_command() -> None:
    assert options_of("eval") - {"json"} == set(
        inspect.signature(permllm_offline.evaluate).parameters
    )


def test_arguments_come_before_the_recipe_file_and_it_before_the_preset(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pattern: '4:8'\nsequence_length: 16\nlearning: {steps: 1, patience: 9}\n")
    report = permllm_offline.prune(
        tiny_model_directory,
        tmp_path / "sparse",
        recipe=file,
        preset="paper",
        dataset=text_file,
        num_samples=5,
        learning={"steps": 2, "windows_per_step": 1, "validation_windows": 1},
    )
    used = report.recipe
    assert (used.method, used.pattern, used.sequence_length) == ("permllm-wanda", "4:8", 16)
    assert (used.learning.steps, used.learning.patience, used.num_samples) == (2, 9, 5)
    assert (used.learning.initial, used.sampling) == ("random", "document")


def test_bad_arguments_are_refused(tiny_model_directory: Path, text_file: Path) -> None:
    with pytest.raises(OfflineError, match="--sequence-length 1: a window has at least 2 tokens"):
        permllm_offline.evaluate(tiny_model_directory, text_file, sequence_length=1)
    with pytest.raises(OfflineError, match="method 'best' is not known"):
        permllm_offline.prune(tiny_model_directory, "nowhere", method="best")


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, permllm_offline; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert shown.stdout.strip() == b"False"
