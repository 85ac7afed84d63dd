"""vLLM takes compiled graphs from its cache only where layers have the operands of those traced."""

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedConfig
from vllm.config import ModelConfig, VllmConfig
from vllm.config import utils as config_utils

from permllm_vllm.quantization import config as config_module
from permllm_vllm.quantization.config import PermLLMConfig
from tests.quantization.sparse_modules import config

ATTENTION = "model.layers.0.self_attn"
QKV = [f"{ATTENTION}.{part}_proj" for part in "qkv"]


def language_model() -> PreTrainedConfig:
    return LlamaConfig(num_hidden_layers=1, architectures=["LlamaForCausalLM"])


def language_model_of_images() -> PreTrainedConfig:
    return LlavaConfig(
        text_config=language_model(),
        vision_config=CLIPVisionConfig(num_hidden_layers=1),
        architectures=["LlavaForConditionalGeneration"],
    )


@pytest.fixture(params=[language_model, language_model_of_images])
def graph_key(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[PermLLMConfig], str]:
    """By what vLLM finds the graphs of a language model again, always in the same directory.

    It builds the one inside a model of images by its own configuration, without the outer one.
    """

    def key(quantization: PermLLMConfig) -> str:
        model: PreTrainedConfig = request.param()
        model.quantization_config = quantization.checkpoint.to_dict()
        model.save_pretrained(tmp_path)
        served = VllmConfig(model_config=ModelConfig(str(tmp_path), skip_tokenizer_init=True))
        assert isinstance(served.quant_config, PermLLMConfig)
        text = served.model_config.hf_config.get_text_config()
        return _hash(served.with_hf_config(text))

    return key


def _hash(served: VllmConfig) -> str:
    if hasattr(served, "compute_hash"):  # up to vLLM 0.33
        return str(served.compute_hash())
    return str(config_utils.hash_factors(served.compile_factors()))


def test_other_kernels(
    graph_key: Callable[[PermLLMConfig], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = graph_key(config())
    assert before == graph_key(config())
    monkeypatch.setattr(config_module, "kernels", lambda: "others")
    assert before != graph_key(config())


def test_another_checkpoint(graph_key: Callable[[PermLLMConfig], str]) -> None:
    """One that was pruned in another way may have taken the place of the first."""
    keys = [
        graph_key(config()),
        graph_key(config(runtime_permuted=QKV)),
        graph_key(config(folded=[f"{ATTENTION}.o_proj"])),
        graph_key(config(ignore=QKV)),
        graph_key(config(value_dtype="int8")),
    ]
    assert len(set(keys)) == len(keys)
