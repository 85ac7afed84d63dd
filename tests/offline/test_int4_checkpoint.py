"""`prune --values int4`: what the checkpoint holds, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.test_cli import prune


@pytest.mark.parametrize("method", ["magnitude", "wanda+cp", "permllm-best"])
def test_int4_values(
    method: str, tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    """They are int8 values of which all of a row and 64 inputs are few multiples of one number."""
    text = None if method == "magnitude" else text_file
    output = tmp_path / "sparse"
    assert prune(tiny_model_directory, output, text, "--method", method, "--values", "int4") == 0
    assert validate(output) == []
    reader = CheckpointReader(output)
    assert reader.quantization is not None
    assert reader.quantization.value_dtype == "int8"
    tensors = load_file(output / "model.safetensors")
    packed = [tensor for name, tensor in tensors.items() if name.endswith("weight_packed")]
    assert all(len(tensor.unique()) > 16 for tensor in packed)
    for tensor in packed:
        for group in tensor.int().split(32, dim=1):
            steps = torch.from_numpy(np.gcd.reduce(group.numpy(), axis=1))[:, None]
            assert ((group >= -8 * steps) & (group <= 7 * steps)).all()
    report = json.loads((output / "report.json").read_text())
    assert all(0.02 < layer["int8_error"] < 0.2 for layer in report["layers"])
    card = (output / "README.md").read_text()
    assert "int4, stored as int8" in card
    assert ("before tuning" in card) == (method == "permllm-best")


def test_int4_values_need_permutations_inside_their_groups(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "wanda+cp", "--values", "int4", "--block-size=128")
    assert prune(tiny_model_directory, tmp_path / "sparse", None, *options) == 2
    assert "give --block-size 64 and a method" in capsys.readouterr().err
