"""Every family: what is folded, permuted and baked is the same function as its masked twin."""

from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.calibration.statistics import last_hidden_state
from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.language_model import language_model_of
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.model.lookup import family_of
from permllm_offline.model.modules import decoder_layers
from permllm_vllm.checkpoint.ignoring import matches
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.validation import validate
from tests.offline.baked_models import bake, decisions_of, dense_twin, integer_grids
from tests.offline.tiny_models import STRUCTURES, tiny_model

OPT_350M = {"do_layer_norm_before": False}
"""Norms come after attention and MLP, and the model has no final one."""


def tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("model_type", "options", "o_folded"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),  # with biases
        ("qwen3", {"head_dim": 80, "num_attention_heads": 4}, False),
        ("qwen3_5_text", {}, False),
        ("qwen3_moe", {}, True),
        ("qwen3_moe", {"mlp_only_layers": [0]}, True),
        ("mixtral", {}, True),
        ("gemma3_text", {}, True),
        ("phi3", {"num_attention_heads": 4, "num_key_value_heads": 2}, True),
        ("phi3", {"hidden_size": 192, "head_dim": 96}, False),
        ("opt", {}, True),
        ("opt", OPT_350M, True),
        ("opt", {"num_attention_heads": 4}, False),
        ("gpt_neox", {}, True),
        ("gpt_neox", {"hidden_size": 192, "num_attention_heads": 2}, False),
        ("cohere", {"use_qk_norm": True}, True),
        ("glm4", {}, True),
        ("olmo", {}, True),
        ("arcee", {"mlp_bias": True}, True),
        ("nemotron", {}, True),
        ("starcoder2", {}, True),
    ],
)
def test_the_baked_model_equals_its_masked_twin(
    tmp_path: Path, model_type: str, options: dict[str, Any], o_folded: bool
) -> None:
    model, pattern = tiny_model(model_type, **options), Pattern(2, 4)
    model.set_attn_implementation("eager")  # the others leave out the cap of Gemma 2's attention
    decisions = decisions_of(model, pattern, 64)
    folded = [one.layout.folded for one in decisions[0]]
    every_mlp = [False, True] * (len(folded) // 2 - 1)  # more than one with experts
    assert folded == [False, o_folded, *every_mlp]
    bake(model, decisions, pattern, 64, tmp_path / "baked")
    assert validate(tmp_path / "baked") == []
    baked = load_model(open_source(str(tmp_path / "baked")), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = dense_twin(model, decisions)(tokens()).logits
        found, dense = baked(tokens()).logits, model(tokens()).logits
    scale = expected.abs().max()
    assert (found - expected).abs().max() / scale < 1e-5
    assert (dense - expected).abs().max() / scale > 1e-2


@pytest.mark.parametrize(
    ("model_type", "options"),
    [*((name, {}) for name in STRUCTURES), ("opt", OPT_350M)],
)
def test_smoothing_changes_no_answer(
    tmp_path: Path, model_type: str, options: dict[str, Any]
) -> None:
    """What divides inputs is undone by the columns that they meet, whoever else reads them."""
    model, pattern = tiny_model(model_type, **options), Pattern(2, 4)
    model.set_attn_implementation("eager")  # the others leave out the cap of Gemma 2's attention
    vary_norms(model)
    decisions = decisions_of(model, pattern, 64)
    grids = integer_grids(model, decisions)
    bake(model, decisions, pattern, 64, tmp_path / "baked", grids)
    exponents = [one for layer in grids for one in layer.exponents.values()]
    assert exponents
    assert all(bool(one.any()) for one in exponents)
    baked = load_model(open_source(str(tmp_path / "baked")), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected, found = model(tokens()).logits, baked(tokens()).logits
    assert (found - expected).abs().max() / expected.abs().max() < 1e-4  # sums of another order


def vary_norms(model: torch.nn.Module) -> None:
    """Give the channels of norms different weights, and biases."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            noise = torch.rand(parameter.shape, generator=generator)
            parameter.data = (parameter.data + noise).to(parameter.dtype)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_linear_is_pruned_or_ignored(model_type: str) -> None:
    model = tiny_model(model_type)
    language = language_model_of(model.config, ())
    family = language.family()
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    count = model.config.num_hidden_layers
    linears = {language.names.stored_module(name) for name in linears}
    pruned = {family.stored_name(layer, n) for layer in range(count) for n in family.linears}
    for group in family.groups:
        for linear in group.linears:
            everywhere = [family.stored_name(layer, linear) for layer in range(count)]
            held = [name in linears for name in everywhere]
            assert all(held) if group.in_every_layer else any(held)
    assert all(any(matches(entry, name) for entry in family.ignore) for name in linears - pruned)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [*((name, {}) for name in STRUCTURES), ("opt", OPT_350M)],
)
def test_layers_run_one_by_one_are_the_model(model_type: str, options: dict[str, Any]) -> None:
    model = tiny_model(model_type, **options)
    family = family_of(model.config)
    calls = record_calls(model, family, tokens())
    states = calls.states
    for layer, call in zip(decoder_layers(model, family.layers), calls.layers, strict=True):
        states = run_windows(layer, states, call)
    with torch.no_grad():
        expected = last_hidden_state(model, family, tokens())
    found = states.hidden  # sums of another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
