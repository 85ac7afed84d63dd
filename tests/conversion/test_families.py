"""Every family: baked, dense again, and loaded in Transformers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import permllm_vllm.hf  # noqa: F401  (loads permllm checkpoints in transformers)
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_vllm.checkpoint.pattern import Pattern
from tests.conversion.sparse_models import load_all
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import STRUCTURES, as_published, tiny_model


def decoder(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of the decoder layers: Transformers saves GPT-NeoX's head under another name."""
    return {n: tensor for n, tensor in load_all(directory).items() if ".layers." in n}


@pytest.mark.parametrize("model_type", STRUCTURES)
def test_there_and_back(tmp_path: Path, model_type: str) -> None:
    model, pattern = tiny_model(model_type), Pattern(2, 4)
    decisions = decisions_of(model, pattern, 64)
    bake(model, decisions, pattern, 64, tmp_path / "baked")
    twin = dense_twin(model, decisions)

    convert_to_dense(str(tmp_path / "baked"), tmp_path / "dense")
    as_published(twin).save_pretrained(tmp_path / "twin")
    expected, found = decoder(tmp_path / "twin"), decoder(tmp_path / "dense")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name

    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "baked", dtype=torch.float32)
    with torch.no_grad():
        exact, served = twin(tokens).logits, sparse(tokens).logits
    assert (served - exact).abs().max() < 1e-4 * exact.abs().max()
