"""Pruning on a GPU, against pruning on the CPU."""

from pathlib import Path

import pytest
import torch

from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

SHORT = ("--steps", "2", "--num-samples", "12", "--sequence-length", "16")


def prune(model: Path, output: Path, text: Path, *options: str) -> None:
    line = ["prune", str(model), "--output", str(output), "--dataset", str(text), *SHORT]
    assert main([*line, *options]) == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--method", "wanda+cp-lsa", "--values", "int8"),
        ("--method", "sparsegpt"),
        ("--method", "wanda+cp", "--reconstruction", "obs+blockwise"),
        ("--method", "permllm-wanda", "--reconstruction", "sparsegpt"),
        ("--method", "permllm-wanda", "--reconstruction", "distillation", "--effort", "low"),
    ],
    ids=lambda options: "-".join(options[1::2]),
)
def test_every_part_of_a_prune(
    options: tuple[str, ...], tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    output = tmp_path / "sparse"
    prune(tiny_model_directory, output, text_file, *options, "--device", "cuda")
    assert validate(output) == []


def test_the_same_weights_are_kept(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    for device in ("cpu", "cuda"):
        options = ("--method", "magnitude", "--device", device)
        prune(tiny_model_directory, tmp_path / device, text_file, *options)
    first, second = (tmp_path / device / "model.safetensors" for device in ("cpu", "cuda"))
    assert first.read_bytes() == second.read_bytes()
