"""How a sparse model is built and loaded on a CPU, where vLLM and torch alone get some wrong."""

from contextlib import nullcontext
from typing import Any

from torch.nn import Module

from permllm_vllm.checkpoint import schema
from permllm_vllm.quantization.activations import activate_by_kernel
from permllm_vllm.quantization.compiler import keep_helpers_eager
from permllm_vllm.quantization.expert_routing import choose_by_corrected_scores, scale_routes
from permllm_vllm.quantization.gateless_experts import gateless_experts_accepted
from permllm_vllm.quantization.inductor import keep_order
from permllm_vllm.quantization.latent_attention import store_values_by_head
from permllm_vllm.quantization.mamba_states import refuse_drafts, split_prompts_at_blocks
from permllm_vllm.quantization.norms import normalize_by_kernel
from permllm_vllm.quantization.rotary import rotate_in_pytorch


class OnCpu:
    """Stands before a loader of vLLM's; other models are loaded as by that.

    It acts before a model is built, since its classes may be compiled then.
    """

    def load_model(self, vllm_config: Any, model_config: Any, **options: Any) -> Module:
        """Build a model and load it."""
        sparse = model_config.quantization == schema.QUANT_METHOD
        eager = not vllm_config.compilation_config.mode
        on_cpu = sparse and vllm_config.device_config.device_type == "cpu"
        if on_cpu:
            keep_order()
            keep_helpers_eager(eager=eager)
            normalize_by_kernel(eager=eager)
            rotate_in_pytorch(vllm_config.compilation_config, model_config.hf_config)
        loader: Any = super()
        with gateless_experts_accepted() if on_cpu else nullcontext():
            model: Module = loader.load_model(vllm_config, model_config, **options)
        if on_cpu:
            refuse_drafts(model, vllm_config)
            activate_by_kernel(model, eager=eager)
            store_values_by_head(model)
            choose_by_corrected_scores(model)
            scale_routes(model, model_config.dtype)
            split_prompts_at_blocks(model)
        return model
