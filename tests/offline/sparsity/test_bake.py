"""Baked models are the same function as their masked, unfolded twin."""

from pathlib import Path

import pytest
import torch

from permllm_offline.model.loading import load_model, open_source
from permllm_offline.sparsity.rounded_layer import Rounding
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.baked_models import bake, decisions_of, dense_twin, integer_grids
from tests.offline.tiny_models import tiny_llama


@pytest.mark.parametrize(
    ("heads", "key_value", "size", "block", "pattern", "o_folded"),
    [
        (4, 2, 64, 64, "2:4", True),
        (2, 2, 64, 64, "2:4", True),
        (4, 1, 64, 32, "4:8", True),
        (2, 1, 128, 64, "2:4", True),
        (2, 1, 64, 128, "2:4", False),
        (4, 2, 80, 64, "2:4", False),
        (2, 1, 96, 64, "4:8", False),
        (2, 1, 96, 32, "2:4", True),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_the_baked_model_equals_its_masked_twin(
    tmp_path: Path,
    heads: int,
    key_value: int,
    size: int,
    block: int,
    pattern: str,
    o_folded: bool,
    bias: bool,
) -> None:
    model = tiny_llama(
        num_attention_heads=heads,
        num_key_value_heads=key_value,
        head_dim=size,
        hidden_size=128,
        intermediate_size=256,
        attention_bias=bias,
        mlp_bias=bias,
    )
    decisions = decisions_of(model, Pattern.parse(pattern), block)
    assert [group.layout.folded for group in decisions[0]] == [False, o_folded, False, True]

    bake(model, decisions, Pattern.parse(pattern), block, tmp_path / "baked")
    twin = dense_twin(model, decisions)
    assert validate(tmp_path / "baked") == []
    baked = load_model(open_source(str(tmp_path / "baked")), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = twin(tokens).logits, baked(tokens).logits
        dense = model(tokens).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-5
    assert (dense - expected).abs().max() / scale > 1e-2


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_integers_equal_their_rounded_twin(values: Rounding, tmp_path: Path) -> None:
    model = tiny_llama(attention_bias=True, mlp_bias=True)
    decisions = decisions_of(model, Pattern(2, 4), 64)
    grids = integer_grids(model, decisions, values)
    bake(model, decisions, Pattern(2, 4), 64, tmp_path / "baked", grids)

    assert [set(layer.exponents) for layer in grids] == 2 * [{"qkv", "o", "gate_up", "down"}]
    assert validate(tmp_path / "baked") == []
    baked = load_model(open_source(str(tmp_path / "baked")), torch.float32, torch.device("cpu"))
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = model(tokens).logits, baked(tokens).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-5


def test_folding_moves_rows_and_stores_where_from(tmp_path: Path) -> None:
    model = tiny_llama()
    decisions = decisions_of(model, Pattern(2, 4), 64)
    bake(model, decisions, Pattern(2, 4), 64, tmp_path / "baked")
    reader = CheckpointReader(tmp_path / "baked")
    down = reader.layer("model.layers.0.mlp.down_proj")
    assert down.input_permutation is None
    assert down.folded_permutation is not None
    up = reader.layer("model.layers.0.mlp.up_proj")
    assert up.input_permutation is not None
    assert torch.equal(up.input_permutation, decisions[0][2].permutation)
    # q is neither folded into nor fed by a fold: only its mask separates it from the original.
    q = reader.layer("model.layers.0.self_attn.q_proj").dense(Pattern(2, 4), 64)
    original = model.model.layers[0].self_attn.q_proj.weight
    assert torch.equal(q, original * decisions[0][0].mask("self_attn.q_proj"))
