"""What ``eval`` measures, and what its options change."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm_offline.cli import main
from permllm_offline.preparation import prepared
from permllm_offline.text.windows import sample_windows
from tests.offline.tiny_models import random_text

LENGTH = 24


def measured(model: Path, text: Path, *options: str) -> dict[str, Any]:
    result = text.with_name("result.json")
    arguments = ("--dataset", str(text), "--sequence-length", str(LENGTH), "--json", str(result))
    assert main(["eval", str(model), *arguments, *options]) == 0
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def expected_perplexity(model: Path, text: str) -> float:
    """Over whole windows, one after the other; the first token of each is not predicted."""
    tokens = torch.tensor(AutoTokenizer.from_pretrained(model)(text)["input_ids"])
    windows = tokens[: len(tokens) // LENGTH * LENGTH].view(-1, LENGTH)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        logits = network(windows).logits[:, :-1].double()
    return float(cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "held-out.txt"
    file.write_text(random_text(20 * LENGTH + 5, seed=2), encoding="utf-8")
    return file


def test_the_perplexity_of_a_dense_model_is_that_of_its_windows(
    tiny_model_directory: Path, text: Path
) -> None:
    found = measured(tiny_model_directory, text)
    assert found["windows"] == 20
    expected = expected_perplexity(tiny_model_directory, text.read_text())
    assert found["perplexity"] == pytest.approx(expected, rel=1e-5)


def test_eval_of_the_held_out_windows_equals_the_report(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def record(*arguments: Any, **options: Any) -> Any:
        drawn.append(sample_windows(*arguments, **options))
        return drawn[-1]

    monkeypatch.setattr(prepared, "sample_windows", record)
    output, held_out = tmp_path / "sparse", tmp_path / "held-out.txt"
    sizes = ("--num-samples", "12", "--sequence-length", str(LENGTH), "--dataset", str(text_file))
    options = ("--method", "wanda+cp", *sizes)
    assert main(["prune", str(tiny_model_directory), "--output", str(output), *options]) == 0
    report = json.loads((output / "report.json").read_text())

    (windows,) = drawn
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    words = tokenizer.convert_ids_to_tokens(windows.held_out.flatten().tolist())
    held_out.write_text(" ".join(words), encoding="utf-8")
    before, after = measured(tiny_model_directory, held_out), measured(output, held_out)
    assert before["windows"] == after["windows"] == len(windows.held_out) > 1
    assert before["perplexity"] == pytest.approx(report["perplexity_before"], rel=1e-5)
    assert after["perplexity"] == pytest.approx(report["perplexity_after"], rel=1e-5)
    assert report["perplexity_after"] != pytest.approx(report["perplexity_before"], rel=1e-3)


def test_max_windows_measures_the_first(tiny_model_directory: Path, text: Path) -> None:
    found = measured(tiny_model_directory, text, "--max-windows", "3")
    first = " ".join(text.read_text().split()[: 3 * LENGTH])
    expected = expected_perplexity(tiny_model_directory, first)
    assert (found["windows"], found["perplexity"]) == (3, pytest.approx(expected, rel=1e-5))


def test_the_text_field_says_what_is_read_of_a_row(
    tmp_path: Path, tiny_model_directory: Path, text: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    body = text.read_text()
    rows.write_text(json.dumps({"text": random_text(400, seed=3), "body": body}))
    found = measured(tiny_model_directory, rows, "--text-field", "body")["perplexity"]
    assert found == pytest.approx(expected_perplexity(tiny_model_directory, body), rel=1e-5)
    assert measured(tiny_model_directory, rows)["perplexity"] != pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize("options", [(), ("-v",)])
def test_an_error_has_a_traceback_where_it_is_asked_for(options: tuple[str, ...]) -> None:
    line = [sys.executable, "-m", "permllm_offline", "eval", "model", *options]
    ended = subprocess.run(line, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ("Traceback (most recent call last)" in ended.stderr) == bool(options)
    shown = "permllm-offline eval: error: nothing to measure: give --dataset, --tasks, or both."
    assert ended.stderr.splitlines()[-1] == shown


@pytest.mark.parametrize(
    ("options", "level"),
    [((), logging.WARNING), (("-v",), logging.INFO), (("--verbose",), logging.INFO)],
)
def test_verbose_is_more_log(
    options: tuple[str, ...], level: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    levels = []
    monkeypatch.setattr(logging, "basicConfig", lambda **given: levels.append(given["level"]))
    assert main(["eval", "model", *options]) == 2
    assert levels == [level]
