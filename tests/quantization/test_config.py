"""Which layer gets which method, and what is refused before anything is loaded."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.config.quantization import QuantizationConfigArgs
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

import permllm_vllm
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.quantization import config as config_module
from permllm_vllm.quantization.config import PermLLMConfig
from permllm_vllm.quantization.head import HeadMethod
from permllm_vllm.quantization.linear import PermLLMLinearMethod
from permllm_vllm.quantization.served import build_digest, kernels
from tests.quantization.sparse_modules import config

ATTENTION = "model.layers.0.self_attn"
QKV = [f"{ATTENTION}.{part}_proj" for part in "qkv"]


EXPERT_PARTS = [
    f"model.layers.0.mlp.experts.{expert}.{part}_proj"
    for expert in range(2)
    for part in ("gate", "up", "down")
]


def experts() -> torch.nn.Module:
    """Two experts that were never built."""
    layer = layer_of(RoutedExperts)
    layer.__dict__["moe_config"] = SimpleNamespace(num_logical_experts=2, is_act_and_mul=True)
    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    layer.__dict__ |= {f"ckpt_{part}_proj_name": name for part, name in names.items()}
    return layer


def layer_of(layer_class: type) -> torch.nn.Module:
    """A layer that was never built: the configuration looks at its class alone."""
    return layer_class.__new__(layer_class)


def method(configuration: PermLLMConfig, prefix: str) -> object:
    return configuration.get_quant_method(layer_of(LinearBase), prefix)


def test_vllm_finds_the_method() -> None:
    assert get_quantization_config("permllm") is PermLLMConfig
    assert PermLLMConfig.get_name() == "permllm"


def test_linear_layers_are_sparse() -> None:
    found = method(config(QKV, folded=[f"{ATTENTION}.o_proj"]), f"{ATTENTION}.qkv_proj")
    assert isinstance(found, PermLLMLinearMethod)
    assert found.modules == QKV
    assert found.permuted
    assert not found.folded
    output = method(config(QKV, folded=[f"{ATTENTION}.o_proj"]), f"{ATTENTION}.o_proj")
    assert isinstance(output, PermLLMLinearMethod)
    assert output.folded
    assert not output.permuted


@pytest.mark.parametrize(
    ("parts", "leaves"), [(2, ["gate_proj", "up_proj"]), (1, ["gate_up_proj"])]
)
def test_gate_and_up_where_the_model_class_does_not_list_them(
    parts: int, leaves: list[str]
) -> None:
    """vLLM fuses those of Qwen3 MoE; Phi-3 stores them as one, which its Transformers class is."""
    configuration = config()
    configuration.packed_modules_mapping = {}
    layer = layer_of(LinearBase)
    if parts > 1:  # as vLLM's fused layers have; others lack the attribute
        layer.__dict__["output_sizes"] = [8] * parts
    found = configuration.get_quant_method(layer, "model.layers.0.mlp.gate_up_proj")
    assert isinstance(found, PermLLMLinearMethod)
    assert found.modules == [f"model.layers.0.mlp.{leaf}" for leaf in leaves]


def test_embeddings_and_the_output_head_stay_dense() -> None:
    for layer_class in (ParallelLMHead, VocabParallelEmbedding):
        assert type(config().get_quant_method(layer_of(layer_class), "lm_head")) is HeadMethod


def test_other_layers_are_left_to_vllm() -> None:
    assert config().get_quant_method(torch.nn.Module(), "model.layers.0.self_attn.attn") is None


@pytest.mark.parametrize("ignore", [QKV, [r"re:model\.layers\.0\..*"]])
def test_ignored_layers_are_dense(ignore: list[str]) -> None:
    found = method(config(ignore=ignore), f"{ATTENTION}.qkv_proj")
    assert isinstance(found, UnquantizedLinearMethod)
    other = method(config(ignore=ignore), "model.layers.10.self_attn.qkv_proj")
    assert isinstance(other, PermLLMLinearMethod)


@pytest.mark.parametrize("key", ["ignore", "runtime_permuted", "folded"])
def test_part_of_a_fused_layer(key: str) -> None:
    configuration = config(**{key: QKV[:2]})
    with pytest.raises(CheckpointError, match=rf"q_proj, .*k_proj .*`{key}`.*v_proj not") as error:
        method(configuration, f"{ATTENTION}.qkv_proj")
    assert f"{ATTENTION}.qkv_proj" in str(error.value)


@pytest.mark.parametrize(
    "ignore",
    [["model.layers.0.mlp.experts"], [r"re:.*\.experts\..*"], EXPERT_PARTS],
)
def test_ignored_experts_are_dense(ignore: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnquantizedFusedMoEMethod, "__init__", lambda self, moe: None)
    found = config(ignore=ignore).get_quant_method(experts(), "model.layers.0.mlp.experts")
    assert isinstance(found, UnquantizedFusedMoEMethod)


@pytest.mark.parametrize(
    ("listed", "what"),
    [
        ({"ignore": EXPERT_PARTS[:3]}, "left dense"),
        ({"runtime_permuted": EXPERT_PARTS[:2]}, "permuted at run time"),
        ({"folded": EXPERT_PARTS[2:3]}, "folded permutation"),
    ],
)
def test_some_of_the_experts(listed: dict[str, list[str]], what: str) -> None:
    configuration = config(**listed)
    with pytest.raises(CheckpointError, match=rf"experts\.0\..* {what} .*experts\.1\..* not"):
        configuration.get_quant_method(experts(), "model.layers.0.mlp.experts")


def test_a_dense_checkpoint_is_refused() -> None:
    with pytest.raises(CheckpointError, match="some/model is not a PermLLM checkpoint") as error:
        PermLLMConfig().maybe_update_config("some/model", hf_config=PreTrainedConfig())
    assert "permllm-offline prune MODEL --output DIRECTORY" in str(error.value)
    config().maybe_update_config("some/model", hf_config=PreTrainedConfig())
    config().maybe_update_config("some/model")


def test_batch_invariance_that_is_not_there_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(config_module.logger, "warning", messages.append)
    config().maybe_update_config("some/model")
    assert not messages
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    config().maybe_update_config("some/model")
    assert "VLLM_BATCH_INVARIANT does not reach sparse layers" in messages[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 3}, "install a newer permllm-vllm from its source"),
        ({"pattern": "3:4"}, "2:4, 4:8"),
        ({"block_size": 48}, "32, 64, 128"),
        ({"sparsity": 0.5}, "does not know this key"),
        ({"ignore": ["re:("]}, "no regular expression"),
    ],
)
def test_a_wrong_quantization_config(change: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        PermLLMConfig.from_config({**config().checkpoint.to_dict(), **change})


def test_names_follow_the_model_class() -> None:
    configuration = config(QKV, folded=[f"{ATTENTION}.o_proj"], ignore=["lm_head", "re:visual.*"])
    mapper = WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."})
    configuration.apply_vllm_mapper(mapper)
    assert configuration.checkpoint.runtime_permuted == [f"language_model.{name}" for name in QKV]
    assert configuration.checkpoint.folded == [f"language_model.{ATTENTION}.o_proj"]
    assert configuration.checkpoint.ignore == ["lm_head", "re:visual.*"]
    assert isinstance(
        method(configuration, f"language_model.{ATTENTION}.qkv_proj"), PermLLMLinearMethod
    )


def test_regexes_see_the_names_of_the_checkpoint() -> None:
    """A model class that renames modules does not change which ones are left dense."""
    configuration = config(ignore=[r"re:model\.layers\.0\.self_attn\..*"])
    configuration.apply_vllm_mapper(
        WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "visual.": ""})
    )
    dense = method(configuration, f"language_model.{ATTENTION}.qkv_proj")
    assert isinstance(dense, UnquantizedLinearMethod)
    sparse = method(configuration, "language_model.model.layers.1.self_attn.qkv_proj")
    assert isinstance(sparse, PermLLMLinearMethod)


def test_regexes_follow_any_renaming_of_a_directory(tmp_path: Path) -> None:
    """By regular expressions too, which cannot be undone: vLLM's Transformers backend has them."""
    names = [f"transformer.h.{layer}.{part}" for layer in range(2) for part in ("out", "norm")]
    save_file({f"{name}.weight": torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    configuration = config(ignore=[r"re:transformer\.h\.0\.(?:out|in)"])
    configuration.maybe_update_config(str(tmp_path))
    renaming = {re.compile(r"^transformer\.h\.(.+)"): r"model.layers.\1"}
    configuration.apply_vllm_mapper(WeightsMapper(orig_to_new_regex=renaming))
    assert configuration.checkpoint.ignore[:1] == ["model.layers.0.out"]
    assert isinstance(method(configuration, "model.layers.0.out"), UnquantizedLinearMethod)
    assert isinstance(method(configuration, "model.layers.1.out"), PermLLMLinearMethod)


@pytest.mark.parametrize("key", ["ignore", "runtime_permuted", "folded"])
def test_a_draft_model_has_the_names_of_its_checkpoint(key: str) -> None:
    """vLLM puts `draft_model.` before the layers of a model that drafts for another."""
    found = method(config(**{key: QKV}), f"draft_model.{ATTENTION}.qkv_proj")
    if key == "ignore":
        assert isinstance(found, UnquantizedLinearMethod)
    else:
        assert isinstance(found, PermLLMLinearMethod)
        assert found.permuted == (key == "runtime_permuted")
        assert found.folded == (key == "folded")
        assert found.modules == QKV


@pytest.mark.parametrize("adapters", [False, True])
def test_permutations_are_unfolded_for_adapters(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    if adapters:
        monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())
    found = method(config(folded=[f"{ATTENTION}.o_proj"]), f"{ATTENTION}.o_proj")
    assert isinstance(found, PermLLMLinearMethod)
    assert (found.unfolding is not None) == adapters


def test_adapters_do_not_fit_smoothed_inputs(
    vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert isinstance(method(config(smoothed=True), f"{ATTENTION}.o_proj"), PermLLMLinearMethod)
    monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())
    with pytest.raises(NotImplementedError, match=r"`smoothed`.*or convert with --no-smoothing"):
        method(config(smoothed=True), f"{ATTENTION}.o_proj")


def test_dtypes() -> None:
    assert torch.float64 not in PermLLMConfig.get_supported_act_dtypes()
    assert {torch.bfloat16, torch.float16, torch.float32} <= set(
        PermLLMConfig.get_supported_act_dtypes()
    )


def test_vllm_quantizes_dense_layers_alone() -> None:
    """Its own way of doing that while it loads would read the weight of a sparse layer."""
    quantization = config(ignore=QKV)
    arguments = QuantizationConfigArgs(linear="fp8_per_tensor")
    quantization.online_quantization_config = OnlineQuantizationConfig(arguments)
    layer = layer_of(LinearBase)
    quantization.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert quantization.get_quant_method(layer, f"{ATTENTION}.qkv_proj") is not None
    with pytest.raises(NotImplementedError, match=r"o_proj to be quantized, but it is sparse"):
        quantization.get_quant_method(layer, f"{ATTENTION}.o_proj")
    arguments = QuantizationConfigArgs(linear="fp8_per_tensor", ignore=[f"{ATTENTION}.o_proj"])
    quantization.online_quantization_config = OnlineQuantizationConfig(arguments)
    assert quantization.get_quant_method(layer, f"{ATTENTION}.o_proj") is not None


def test_builds_of_one_version_are_told_apart(tmp_path: Path) -> None:
    """vLLM would take the compiled graph of another build, whose layers may have other operands."""
    (tmp_path / "backends").mkdir()
    found = {build_digest(tmp_path)}
    for name, content in (("_C.so", b"1"), ("_C.so", b"2"), ("backends/cpu.py", b"2")):
        (tmp_path / name).write_bytes(content)
        found.add(build_digest(tmp_path))
    (tmp_path / "backends" / "cpu.py").rename(tmp_path / "backends" / "cuda.py")
    found.add(build_digest(tmp_path))
    assert len(found) == 5
    assert build_digest(Path(permllm_vllm.__file__).parent) in kernels()
