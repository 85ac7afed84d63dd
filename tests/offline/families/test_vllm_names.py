"""What vLLM fuses into one layer is treated alike: it lies in one shared-input group."""

from importlib import import_module

import pytest

from permllm_offline.model.families import FAMILIES

pytest.importorskip("vllm", reason="vLLM is not installed")

SERVED = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "ministral3": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "olmoe": ("olmoe", "OlmoeForCausalLM"),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLiteForCausalLM"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2ForCausalLM"),
    "deepseek_v3": ("deepseek_v2", "DeepseekV3ForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe_text": ("qwen3_5", "Qwen3_5MoeForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "gemma4_text": ("gemma4", "Gemma4ForCausalLM"),
    "opt": ("opt", "OPTForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM"),
    "granitemoeshared": ("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    "granitemoehybrid": ("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "falcon_h1": ("falcon_h1", "FalconH1ForCausalLM"),
    "afmoe": ("afmoe", "AfmoeForCausalLM"),
    "ernie4_5_moe": ("ernie45_moe", "Ernie4_5_MoeForCausalLM"),
    "minimax_m2": ("minimax_m2", "MiniMaxM2ForCausalLM"),
    "lfm2": ("lfm2", "Lfm2ForCausalLM"),
    "lfm2_moe": ("lfm2_moe", "Lfm2MoeForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "cohere": ("commandr", "CohereForCausalLM"),
    "cohere2": ("commandr", "CohereForCausalLM"),
    "cohere2_moe": ("cohere2_moe", "Cohere2MoeForCausalLM"),
    "exaone4": ("exaone4", "Exaone4ForCausalLM"),
    "exaone_moe": ("exaone_moe", "ExaoneMoeForCausalLM"),
    "ernie4_5": ("ernie45", "Ernie4_5ForCausalLM"),
    "apertus": ("apertus", "ApertusForCausalLM"),
    "nemotron": ("nemotron", "NemotronForCausalLM"),
    "nemotron_h": ("nemotron_h", "NemotronHForCausalLM"),
}
"""vLLM's own model classes; the version tested here runs the others through its class for models of
Transformers."""


@pytest.mark.parametrize("model_type", SERVED)
def test_fused_layers_lie_in_one_group(model_type: str) -> None:
    module, name = SERVED[model_type]
    model_class = getattr(import_module(f"vllm.model_executor.models.{module}"), name)
    groups = {
        linear.rpartition(".")[2]: group.name
        for group in FAMILIES[model_type].groups
        for linear in group.linears
    }
    packed = model_class.packed_modules_mapping
    assert packed
    for parts in packed.values():
        assert len({groups.get(part) for part in parts}) == 1, parts
    # Every part of a group that vLLM fuses is known to vLLM by the name of the family.
    fused = {part for parts in packed.values() for part in parts if part in groups}
    touched = {groups[part] for part in fused}
    assert {name for name, group in groups.items() if group in touched} == fused
