"""An engine ends with our message where it cannot serve, before it loads anything."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
