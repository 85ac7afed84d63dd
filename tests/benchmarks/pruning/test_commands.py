"""What is made beside a dense checkpoint follows it."""

import json
from pathlib import Path

import pytest

from benchmarks.pruning import commands
from benchmarks.pruning.commands import magnitude_pruned


def test_a_pruned_twin_is_made_once_and_again_of_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def prune(*arguments: str | Path) -> None:
        output = Path(arguments[arguments.index("--output") + 1])
        output.mkdir()  # as the command, which refuses a folder that is there
        (output / "config.json").write_text("{}")
        made.append(output)
        assert "--restart" in arguments  # steps of a dense model that is no more are refused

    monkeypatch.setattr(commands, "permllm_offline", prune)
    dense = tmp_path / "model"
    dense.mkdir()
    (dense / "config.json").write_text(json.dumps({"hidden_size": 8}))
    twin = magnitude_pruned(dense)
    assert magnitude_pruned(dense) == twin
    assert made == [twin]
    int8 = magnitude_pruned(dense, values="int8")
    (dense / "SHA256SUMS").write_text("1234  model.safetensors\n")
    for values in ("auto", "int8", "auto"):
        magnitude_pruned(dense, values=values)
    assert made == [twin, int8, twin, int8]
