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
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen3_5_text": ("qwen3_5", "Qwen3_5ForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3_text": ("gemma3", "Gemma3ForCausalLM"),
    "opt": ("opt", "OPTForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "cohere": ("commandr", "CohereForCausalLM"),
    "cohere2": ("commandr", "CohereForCausalLM"),
    "exaone4": ("exaone4", "Exaone4ForCausalLM"),
    "ernie4_5": ("ernie45", "Ernie4_5ForCausalLM"),
    "apertus": ("apertus", "ApertusForCausalLM"),
    "nemotron": ("nemotron", "NemotronForCausalLM"),
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
