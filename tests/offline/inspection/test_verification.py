import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from permllm_offline.cli import main

MODULE = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_model_directory: Path) -> Path:
    output = tmp_path_factory.mktemp("pruned") / "sparse"
    arguments = ("--method", "magnitude", "--dtype", "bfloat16")
    assert main(["prune", str(tiny_model_directory), "--output", str(output), *arguments]) == 0
    return output


@pytest.fixture
def checkpoint(pruned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pruned, tmp_path / "sparse"))


def test_a_whole_checkpoint_is_valid(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "verified.json"
    assert main(["inspect", str(checkpoint), "--verify", "--json", str(report)]) == 0
    assert "1 weight file, " in (shown := capsys.readouterr().out)
    assert "valid, checksums agree" in shown
    found = json.loads(report.read_text())
    size = (checkpoint / "model.safetensors").stat().st_size
    assert found == {
        "directory": str(checkpoint),
        "files": 1,
        "bytes": size,
        "checksums": True,
        "problems": [],
        "valid": True,
    }


def test_without_checksums_the_format_is_verified(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint / "SHA256SUMS").unlink()
    assert main(["inspect", str(checkpoint), "--verify"]) == 0
    assert "valid, no checksums are recorded" in capsys.readouterr().out


def change_a_value(checkpoint: Path) -> None:
    """Still a valid checkpoint of another model: only the checksum can tell."""
    weights = load_file(checkpoint / "model.safetensors")
    weights[f"{MODULE}.weight_packed"][0, 0] += 1
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def damage_two_masks(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    for layer in range(2):
        weights[f"model.layers.{layer}.mlp.up_proj.weight_mask"][0, 0] = 0xFF
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})


def cut(checkpoint: Path) -> None:
    content = (checkpoint / "model.safetensors").read_bytes()
    (checkpoint / "model.safetensors").write_bytes(content[:-100])


def remove_weights(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def damage_record(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_text("0 model.safetensors\n")


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (change_a_value, ["model.safetensors: found", "its content changed", "1 problem found"]),
        (
            damage_two_masks,
            [
                "its content changed",
                "model.layers.0.mlp.up_proj.weight_mask: found",
                "model.layers.1.mlp.up_proj.weight_mask: found",
                "3 problems found",
            ],
        ),
        (cut, ["its content changed", "what cannot be opened", "2 problems found"]),
        (remove_weights, ["no safetensors weights"]),
        (damage_record, ["SHA256SUMS: found", "1 problem found"]),
    ],
)
def test_every_problem_is_listed_and_the_status_is_1(
    damage: Callable[[Path], None],
    messages: list[str],
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(checkpoint)
    assert main(["inspect", str(checkpoint), "--verify"]) == 1
    captured = capsys.readouterr()
    for message in messages:
        assert message in captured.out
    assert "Traceback" not in captured.err


def test_an_empty_folder_is_bad_input(tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path), "--verify"]) == 2
