"""Every family: baked, dense again, converted again, and loaded in Transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import permllm_vllm.hf  # noqa: F401  (loads permllm checkpoints in transformers)
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.mixer_settings import compute_as_engines
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import load_all
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import WITH_EXPERTS, as_published, tiny_model


def decoder(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of the decoder layers: Transformers saves GPT-NeoX's head under another name."""
    return {n: tensor for n, tensor in load_all(directory).items() if ".layers." in n}


@pytest.mark.parametrize(
    ("model_type", "options"), [(name, {}) for name in FAMILIES] + WITH_EXPERTS
)
def test_there_and_back(tmp_path: Path, model_type: str, options: dict[str, Any]) -> None:
    model, pattern = tiny_model(model_type, **options), Pattern(2, 4)
    decisions = decisions_of(model, pattern, 64)
    bake(model, decisions, pattern, 64, tmp_path / "baked")
    twin = dense_twin(model, decisions)

    convert_to_dense(str(tmp_path / "baked"), tmp_path / "dense")
    as_published(twin).save_pretrained(tmp_path / "twin")
    expected, found = decoder(tmp_path / "twin"), decoder(tmp_path / "dense")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name

    convert_to_sparse(str(tmp_path / "dense"), tmp_path / "again", strict=True)
    assert validate(tmp_path / "again") == []
    baked, again = decoder(tmp_path / "baked"), decoder(tmp_path / "again")
    assert baked.keys() == again.keys()
    for name, tensor in baked.items():
        assert torch.equal(tensor, again[name]), name

    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    compute_as_engines(sparse)  # as the twin, whatever Transformers bounds
    with torch.no_grad():
        exact, served = twin(tokens).logits, sparse(tokens).logits
    assert (served - exact).abs().max() < 1e-4 * exact.abs().max()


@pytest.mark.parametrize("said", [0, 1])
@pytest.mark.parametrize("holds", [False, True])
def test_layers_that_predict_more_tokens_stay(tmp_path: Path, holds: bool, said: int) -> None:
    model, pattern = tiny_model("glm4_moe", num_nextn_predict_layers=said), Pattern(2, 4)
    decisions = decisions_of(model, pattern, 64)
    bake(model, decisions, pattern, 64, tmp_path / "baked")
    convert_to_dense(str(tmp_path / "baked"), tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    weight = torch.randn(128, 128)
    weight[:, ::2] *= not holds
    more = {
        "model.layers.2.self_attn.o_proj.weight": weight,
        "model.layers.2.enorm.weight": weight[0].clone(),
    }
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    convert_to_sparse(str(tmp_path / "dense"), tmp_path / "again", strict=True)
    assert validate(tmp_path / "again") == []
    reader = CheckpointReader(tmp_path / "again")
    assert reader.quantization is not None
    for name, tensor in more.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.quantization.is_ignored(name.removesuffix(".weight"))
    assert reader.sparse_layers()
