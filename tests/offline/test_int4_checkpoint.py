"""`prune --values int4`: what the checkpoint holds, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline.inspection.contents import inspect
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import SPARSE_KINDS
from permllm_vllm.checkpoint.validation import validate
from tests.offline.test_cli import prune


@pytest.mark.parametrize("method", ["magnitude", "wanda+cp", "permllm-best"])
def test_int4_values(
    method: str, tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    """They take half a byte, and are multiples of a number that a row has for 64 inputs."""
    text = None if method == "magnitude" else text_file
    output = tmp_path / "sparse"
    assert prune(tiny_model_directory, output, text, "--method", method, "--values", "int4") == 0
    assert validate(output) == []
    reader = CheckpointReader(output)
    assert reader.quantization is not None
    assert reader.quantization.value_dtype == "int4"
    assert reader.quantization.format_version == 2
    tensors = load_file(output / "model.safetensors")
    for name in reader.sparse_layers():
        layer = reader.layer(name)
        assert layer.values.dtype == torch.int8
        assert len(layer.values.unique()) > 16
        assert 2 * tensors[f"{name}.weight_packed"].numel() == layer.values.numel()
        multipliers = tensors[f"{name}.weight_multiplier"].int()
        for number, group in enumerate(layer.values.int().split(32, dim=1)):
            steps = multipliers[:, number, None]
            quotients = group // steps
            assert torch.equal(quotients * steps, group)
            assert -8 <= quotients.min() < quotients.max() <= 7
    kinds = [name for name in tensors if name.rpartition(".")[2] in SPARSE_KINDS]
    assert inspect(output).bytes == sum(tensors[name].nbytes for name in kinds)
    report = json.loads((output / "report.json").read_text())
    assert all(0.02 < layer["rounding_error"] < 0.2 for layer in report["layers"])
    card = (output / "README.md").read_text()
    assert "int4" in card
    assert ("before tuning" in card) == (method == "permllm-best")


@pytest.mark.parametrize(("values", "method"), [("int8", "wanda"), ("int4", "permllm-best")])
def test_norms_are_divided_where_inputs_are_smoothed(
    values: str, method: str, tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    options = ("--method", method, "--values", values, "--force")
    model = tmp_path / "uneven"
    shutil.copytree(tiny_model_directory, model)
    dense = load_file(model / "model.safetensors")
    norms = [name for name in dense if name.endswith("layernorm.weight")]
    for name in norms:
        dense[name] = torch.linspace(0.01, 3, dense[name].numel()).to(dense[name].dtype)
    save_file(dense, model / "model.safetensors", {"format": "pt"})
    for more, smoothed in (((), True), (({"smoothing": False},), False)):
        output = tmp_path / "sparse"
        assert prune(model, output, text_file, *options, *more) == 0
        quantization = json.loads((output / "config.json").read_text())["quantization_config"]
        assert quantization.get("smoothed", False) == smoothed
        written = load_file(output / "model.safetensors")
        exponents = torch.cat([(dense[name] / written[name]).log2() for name in norms])
        assert torch.equal(exponents, exponents.round())
        assert (exponents.abs().max() > 1) == smoothed
        assert torch.equal(written["model.norm.weight"], dense["model.norm.weight"])


def test_int4_values_need_permutations_inside_their_groups(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--method", "wanda+cp", "--values", "int4", {"block_size": 128})
    assert prune(tiny_model_directory, tmp_path / "sparse", None, *options) == 2
    assert "give block_size 64 and a method" in capsys.readouterr().err
