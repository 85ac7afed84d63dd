"""The functions, and the page that documents them, as they are."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import permllm_offline
from permllm_offline.errors import OfflineError
from permllm_offline.recipe import Recipe
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


def test_the_arguments_are_the_recipe() -> None:
    parameters = inspect.signature(permllm_offline.prune).parameters
    assert set(Recipe.model_fields) <= set(parameters)
    for name, field in Recipe.model_fields.items():
        if parameters[name].default not in (None, inspect.Parameter.empty):
            assert parameters[name].default == field.default, name


def test_bad_arguments_are_refused(tiny_model_directory: Path, text_file: Path) -> None:
    with pytest.raises(OfflineError, match="sequence length 1"):
        permllm_offline.evaluate(tiny_model_directory, text_file, sequence_length=1)
    with pytest.raises(OfflineError, match="method 'best' is not known"):
        permllm_offline.prune(tiny_model_directory, "nowhere", method="best")


def test_importing_the_package_imports_nothing_heavy() -> None:
    program = "import sys, permllm_offline; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert shown.stdout.strip() == b"False"
