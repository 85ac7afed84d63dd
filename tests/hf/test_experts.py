"""Experts as modules of their own are Transformers' function, and may be sparse."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.core_model_loading import MergeModulelist, WeightConverter

import permllm_vllm.hf  # noqa: F401  (registers the method)
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.hf import SparseLinear, experts
from permllm_vllm.hf.experts import SeparateExperts, separate_experts
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import COMMON, SIZES, tiny_model

LINEARS = ("gate_proj", "up_proj", "down_proj")
MIXTURES = {
    "qwen3_moe": LINEARS,
    "mixtral": ("w1", "w3", "w2"),
}
"""What checkpoints call gate, up and down of an expert."""


def fused_model(model_type: str) -> nn.Module:
    """As Transformers makes it, and multiplies it one expert after the other."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | SIZES[model_type]))
    model: nn.Module = AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    return model.eval()


def experts_of(model: nn.Module) -> list[SeparateExperts]:
    return [module for module in model.modules() if isinstance(module, SeparateExperts)]


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(tokens).logits
    return found


@pytest.mark.parametrize("model_type", MIXTURES)
def test_outputs_and_gradients_are_those_of_transformers(model_type: str, tokens: Tensor) -> None:
    fused, separate = (fused_model(model_type).double() for _ in range(2))
    paths = separate_experts(separate)
    assert paths
    for model in (fused, separate):
        model(tokens).logits.square().sum().backward()
    torch.testing.assert_close(logits(separate, tokens), logits(fused, tokens))
    for path in paths:
        theirs = fused.get_submodule(path)
        for number, expert in enumerate(separate.get_submodule(path)):
            gate, up = theirs.gate_up_proj.grad[number].chunk(2)
            expected = (gate, up, theirs.down_proj.grad[number])
            for name, gradient in zip(MIXTURES[model_type], expected, strict=True):
                mine = expert.get_submodule(name).weight.grad
                reached = torch.zeros_like(gradient) if mine is None else mine
                torch.testing.assert_close(reached, gradient, rtol=1e-5, atol=1e-6)
    embedded = [model.get_input_embeddings().weight.grad for model in (fused, separate)]
    torch.testing.assert_close(*embedded, rtol=1e-5, atol=1e-6)


def test_the_weights_are_views_of_what_was_fused() -> None:
    model = fused_model("qwen3_moe")
    gate_up = model.model.layers[0].mlp.experts.gate_up_proj
    separate_experts(model)
    expert = model.model.layers[0].mlp.experts[3]
    assert expert.gate_proj.weight.data_ptr() == gate_up[3].data_ptr()
    assert expert.up_proj.weight.data_ptr() == gate_up[3, 64:].data_ptr()


def test_an_expert_without_tokens_gives_and_gets_nothing() -> None:
    (experts, *_) = experts_of(tiny_model("qwen3_moe"))
    states = torch.randn(6, 128, requires_grad=True)
    index, weights = torch.tensor([[0, 3]] * 6), torch.rand(6, 2)
    output = experts(states, index, weights)
    expected = sum(experts[n](states) * weights[:, k, None] for k, n in enumerate((0, 3)))
    torch.testing.assert_close(output, expected)
    output.sum().backward()
    assert experts[1].gate_proj.weight.grad is None
    assert experts[3].down_proj.weight.grad is not None


def test_experts_of_another_form_are_refused() -> None:
    config = GptOssConfig(**COMMON, intermediate_size=64, num_local_experts=4, head_dim=64)
    with pytest.raises(CheckpointError, match=r"mlp\.experts: found GptOssExperts with .*biases"):
        separate_experts(GptOssForCausalLM(config))


def test_conversions_that_merge_something_else_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs = (["experts.*.gate.weight"], "experts.gate_up_proj"), (["a.w"], "experts.down_proj")
    conversions = [WeightConverter(*pair, operations=[MergeModulelist()]) for pair in pairs]
    monkeypatch.setattr(experts, "get_model_conversion_mapping", lambda model: conversions)
    with pytest.raises(CheckpointError, match=r"found merged from gate, w; .*3 linears of"):
        separate_experts(fused_model("qwen3_moe"))


@pytest.fixture(scope="module", params=MIXTURES)
def baked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint `sparse`, and the same model as a dense one, `dense`."""
    directory = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param).to(torch.bfloat16)
    decisions = decisions_of(model, Pattern(2, 4), 64)
    bake(model, decisions, Pattern(2, 4), 64, directory / "sparse")
    dense_twin(model, decisions).save_pretrained(directory / "dense")
    return directory


def load(directory: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model


def test_a_sparse_checkpoint_is_its_dense_twin(baked: Path, tokens: Tensor) -> None:
    sparse, expected = load(baked / "sparse"), logits(load(baked / "dense"), tokens)
    (experts, *_) = experts_of(sparse)
    assert [isinstance(one, SparseLinear) for one in experts[3].children()] == [True] * 3 + [False]
    assert (logits(sparse, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
    dense = sparse.dequantize()
    assert not any(isinstance(one, SparseLinear) for one in dense.modules())
    assert (logits(dense, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_conversions_are_asked_for_with_the_model_or_without(baked: Path) -> None:
    model = load(baked / "sparse")
    names, merge = ["experts.*.gate_proj.weight", "experts.*.up_proj.weight"], MergeModulelist(0)
    kept = WeightConverter(["norm.*.weight"], "norm.weight", [merge])
    merged = WeightConverter(names, "experts.gate_up_proj", [merge])
    for arguments in ([kept, merged], model), ([kept, merged],):  # from 5.22 on, and before
        assert model.hf_quantizer.update_weight_conversions(*arguments) == [kept]


def test_a_bare_model_finds_its_experts(baked: Path, tokens: Tensor) -> None:
    bare = AutoModel.from_pretrained(baked / "sparse", dtype=torch.float32)
    dense = AutoModel.from_pretrained(baked / "dense", dtype=torch.float32)
    with torch.no_grad():
        found, expected = bare(tokens).last_hidden_state, dense(tokens).last_hidden_state
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_saving_writes_what_was_read(baked: Path, tokens: Tensor, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(baked / "sparse", dtype="auto")
    logits(model, tokens)  # packed by now
    model.save_pretrained(tmp_path / "saved")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (baked / "sparse", tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor)
        assert after[name].dtype == tensor.dtype
    assert torch.equal(
        logits(load(tmp_path / "saved"), tokens), logits(load(baked / "sparse"), tokens)
    )


def test_a_missing_expert_is_refused(baked: Path, tmp_path: Path) -> None:
    tensors = load_file(baked / "sparse" / "model.safetensors")
    lost = [name for name in tensors if re.search(r"\.experts\.2\.(up_proj|w3)\.", name)]
    (tmp_path / "config.json").write_text((baked / "sparse" / "config.json").read_text())
    kept = {name: tensor for name, tensor in tensors.items() if name not in lost}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.\w+\.weight_packed: found nothing"):
        load(tmp_path)
