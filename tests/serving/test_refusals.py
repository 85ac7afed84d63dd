"""An engine ends with our message where it cannot serve."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.serving.checkpoints import Twins
from tests.serving.engine import Engines

pytestmark = pytest.mark.serving


def test_a_dense_checkpoint(engines: Engines, tiny: Twins) -> None:
    message = engines.refusal(tiny.dense, quantization="permllm")
    assert f"{tiny.dense} is not a PermLLM checkpoint" in message
    assert "permllm-offline prune MODEL --output DIRECTORY" in message


def test_pickled_weights(engines: Engines, tiny: Twins, tmp_path: Path) -> None:
    """vLLM's own loader would take them."""
    directory = shutil.copytree(tiny.sparse, tmp_path / "pickled")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    assert "no safetensors weights" in engines.refusal(directory)


def test_a_missing_norm(engines: Engines, tiny: Twins, tmp_path: Path) -> None:
    """Dense tensors are needed too: vLLM itself would serve with what is in memory."""
    directory = shutil.copytree(tiny.sparse, tmp_path / "incomplete")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "the checkpoint has no model.norm.weight, but" in engines.refusal(directory)
