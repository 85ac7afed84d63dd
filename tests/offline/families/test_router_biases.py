"""What a model's class keeps in float32 is read so, and written so.

A router of DeepSeek V3 chooses experts by scores plus a correction; published ones are near 4, and
in bfloat16 a step there is more than what scores differ by.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from permllm_offline import pipeline
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.recipe.schema import Recipe
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_model

CPU = torch.device("cpu")
BIAS = "mlp.gate.e_score_correction_bias"
STORED = {"deepseek_v3": BIAS, "exaone_moe": "mlp.e_score_correction_bias"}
"""What checkpoints call it."""


@pytest.fixture(params=STORED)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A model of bfloat16, but for correction biases that bfloat16 does not hold."""
    directory: Path = tmp_path / "model"
    tiny_model(request.param).to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)
    (tmp_path / "text.txt").write_text(random_text(400, seed=1))
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.{STORED[request.param]}"
    assert name in tensors
    tensors[name] = 4 + 1e-3 * torch.arange(len(tensors[name]), dtype=torch.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def stored_bias(directory: Path) -> Tensor:
    tensors = load_file(directory / "model.safetensors")
    (bias,) = (one for name, one in tensors.items() if name.endswith("e_score_correction_bias"))
    return bias


def test_whole_models_keep_them(source: Path) -> None:
    model = load_model(open_source(str(source)), torch.bfloat16, CPU)
    assert torch.equal(model.model.layers[1].get_buffer(BIAS), stored_bias(source))
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_layers_that_are_read_one_by_one_keep_them(source: Path) -> None:
    opened = open_source(str(source))
    streamed = StreamedModel(opened, opened.language.family(), torch.bfloat16, CPU)
    with streamed.resident(1) as layer:
        assert torch.equal(layer.get_buffer(BIAS), stored_bias(source))
        assert layer.get_parameter("input_layernorm.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
def test_what_is_written_keeps_them(source: Path, tmp_path: Path, dtype: str) -> None:
    recipe = Recipe(model=str(source), method="magnitude", dtype=dtype)
    pipeline.prune(recipe, tmp_path / "sparse")
    written = stored_bias(tmp_path / "sparse")
    assert written.dtype == torch.float32
    assert torch.equal(written, stored_bias(source))
