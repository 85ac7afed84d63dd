"""``--force`` replaces a checkpoint, and nothing that anybody still needs."""

import shutil
from pathlib import Path

import pytest

import permllm_offline
from permllm_offline.cli import main
from permllm_vllm.checkpoint.errors import CheckpointError

SIZES = ("--method", "wanda", "--num-samples", "4", "--sequence-length", "24")


def prune(model: Path, output: Path, text: Path, *more: str) -> int:
    data = ("--dataset", str(text))
    return main(["prune", str(model), "--output", str(output), *SIZES, *data, *more])


def test_force_replaces_and_its_absence_refuses(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "precious.txt").write_text("keep")
    assert prune(tiny_model_directory, output, text_file) == 2
    assert "is not empty; rule" in capsys.readouterr().err
    assert prune(tiny_model_directory, output, text_file, "--force") == 2
    assert "is not empty and holds no config.json" in capsys.readouterr().err
    assert [file.name for file in output.iterdir()] == ["precious.txt"]
    (output / "config.json").write_text("{}")
    (output / "model.safetensors").touch()
    assert prune(tiny_model_directory, output, text_file, "--force") == 0
    assert not (output / "precious.txt").exists()


def test_what_a_prune_reads_is_not_replaced_by_it(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    (output / "texts").mkdir(parents=True)
    (output / "config.json").write_text("{}")
    (output / "model.safetensors").touch()
    shutil.copy(text_file, output / "texts" / "mine.txt")
    for name in ("mine.yaml", "recipe.yaml"):
        (output / name).write_text("method: wanda\n")
    options = ("--force", "--dry-run")
    for text in (output / "texts" / "mine.txt", output / "texts"):
        assert prune(tiny_model_directory, output, text, *options) == 2
        assert f"contains the data set {text}" in capsys.readouterr().err
    mine = str(output / "mine.yaml")
    assert prune(tiny_model_directory, output, text_file, *options, "--recipe", mine) == 2
    assert f"contains the recipe {mine}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="contains the recipe"):
        permllm_offline.prune(tiny_model_directory, output, recipe=mine, force=True)
    recorded = str(output / "recipe.yaml")  # a checkpoint is made again
    assert prune(tiny_model_directory, output, text_file, *options, "--recipe", recorded) == 0


def test_the_source_is_never_replaced(
    tiny_model_directory: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(tiny_model_directory, tiny_model_directory, text_file, "--force") == 2
    assert "output and source are both" in capsys.readouterr().err
    assert (tiny_model_directory / "model.safetensors").exists()
