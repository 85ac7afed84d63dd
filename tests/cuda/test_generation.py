"""The decoder that measures generation on a GPU, on the CPU against transformers."""

import pytest
import torch

from benchmarks.cuda.generation import (
    TOLERANCE,
    Outcome,
    compare,
    dense_linear,
    prune_layers,
    require_equal,
    sparse_linear,
)
from benchmarks.cuda.llama import Llama, RandomWeights, Shape, load

SMALL = Shape(
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=64,
)
CPU = torch.device("cpu")


def read(shape, weights, layers, linear, prompt):
    linears = [{name: linear(layer) for name, layer in each.items()} for each in layers]
    model = Llama(shape, weights, linears, len(prompt), 16)
    logits = []
    for token in prompt.t():
        model.token.copy_(token)
        model.step()
        logits.append(model.logits.clone())
    return torch.stack(logits, dim=1)


def test_says_what_transformers_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
    )  # fmt: skip
    config = transformers.LlamaConfig(**{name: getattr(SMALL, name) for name in names})
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    shape, weights = load(tmp_path, torch.float32, CPU)
    assert shape == SMALL
    layers = prune_layers(shape, weights)
    prompt = torch.randint(64, (3, 9))
    with torch.inference_mode():
        ours = read(shape, weights, layers, dense_linear, prompt)
        sparse = read(shape, weights, layers, sparse_linear, prompt)
        theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        for layer, pruned in zip(theirs.model.layers, layers, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            qkv = pruned["qkv"].dense.split((128, 64, 64))
            for module, weight in zip(
                (attention.q_proj, attention.k_proj, attention.v_proj), qkv, strict=True
            ):
                module.weight.copy_(weight)
            gate, up = pruned["gate_up"].dense.chunk(2)
            attention.o_proj.weight.copy_(pruned["o"].dense)
            mlp.gate_proj.weight.copy_(gate)
            mlp.up_proj.weight.copy_(up)
            mlp.down_proj.weight.copy_(pruned["down"].dense)
        expected = theirs(prompt).logits
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(sparse, expected, rtol=1e-3, atol=1e-4)


def test_random_weights_have_the_shapes():
    weights = RandomWeights(SMALL, torch.bfloat16, CPU)
    layers = prune_layers(SMALL, weights)
    assert [layers[0][name].dense.shape for name in ("qkv", "o", "gate_up", "down")] == [
        (256, 128),
        (128, 128),
        (384, 128),
        (128, 192),
    ]
    assert weights["model.norm.weight"].shape == (128,)
    assert weights["lm_head.weight"].shape == (64, 128)


@pytest.mark.parametrize(
    ("change", "far"), [(0.0, False), (TOLERANCE / 2, False), (0.5, True), (float("nan"), True)]
)
def test_models_that_differ_are_a_failure(change, far):
    logits = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    dense = Outcome(torch.zeros(2, 3, dtype=torch.int64), logits.log_softmax(-1), 20.0)
    other = dense.log_probabilities.clone()
    other[3, 1, other[3, 1].argmax()] += change
    row = compare(2, dense, Outcome(dense.tokens, other, 10.0))
    assert row["speedup"] == 2
    assert row["same_tokens"] == 1
    if far:
        with pytest.raises(SystemExit, match="differ by more than"):
            require_equal([row])
    else:
        require_equal([row])
