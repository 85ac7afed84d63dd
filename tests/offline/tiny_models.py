"""Tiny random models with a tokenizer and text."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from permllm_offline.model.mixer_settings import compute_as_engines
from permllm_vllm.hf.experts import fused_experts, separate_experts

WORDS = [f"w{number}" for number in range(60)]


COMMON: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA_LIKE = {
    "intermediate_size": 192,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "initializer_range": 0.2,
}
LOCAL = LLAMA_LIKE | {"sliding_window": 8}
GEMMA = LOCAL | {"query_pre_attn_scalar": 64}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
"""For configurations whose own are past the end of a small vocabulary."""
GEMMA4 = TOKENS | {"global_head_dim": 128, "final_logit_softcapping": 30.0}
GEMMA4_EXPERTS = {
    "num_hidden_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "enable_moe_block": True,
    "num_experts": 4,
    "top_k_experts": 2,
    "moe_intermediate_size": 64,
}
"""Of the mixture of the family, beside a dense MLP in each layer."""
GRANITE_HYBRID_EXPERTS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
"""Of the mixture of the family, beside an MLP for all tokens."""
NEMOTRON_H_DENSE = {"layers_block_type": ["linear_attention", "full_attention", "mlp"]}
"""Of the family without experts."""
WITH_EXPERTS = [("gemma4_text", GEMMA4_EXPERTS), ("granitemoehybrid", GRANITE_HYBRID_EXPERTS)]
"""Of families whose models may have none."""
MIXTURE: dict[str, Any] = LLAMA_LIKE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}
OF_EXPERTS_ALONE = LLAMA_LIKE | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 64,
}
"""Of mixtures without a dense MLP, which call the size of an expert as others that of this."""
SHARED = (
    LLAMA_LIKE
    | TOKENS
    | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    | {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True}
)
"""Of a mixture with an MLP for all tokens beside the experts that a router chooses."""
LATENT = (
    SHARED
    | {"num_key_value_heads": 2, "first_k_dense_replace": 1, "q_lora_rank": 64}
    | {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64, "v_head_dim": 64}
)
"""Of multi-head latent attention; vLLM's on CPUs takes no other rank, nor size to rotate."""
BALANCED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""As published: vLLM's routers ask the configuration, where those of Transformers know."""
HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
}
SIZES: dict[str, dict[str, object]] = {
    "llama": LLAMA_LIKE,
    "cwm": LOCAL | TOKENS | {"layer_types": ["sliding_attention", "full_attention"]},
    "helium": LLAMA_LIKE | TOKENS,
    "mistral": LLAMA_LIKE,
    "ministral": LOCAL | TOKENS | {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "qwen2_moe": MIXTURE | {"shared_expert_intermediate_size": 128, "decoder_sparse_step": 2},
    "qwen3_moe": MIXTURE | {"mlp_only_layers": [1]},
    "qwen3_next": MIXTURE
    | HYBRID
    | {"shared_expert_intermediate_size": 128, "mlp_only_layers": [1]},
    "qwen3_5_text": LLAMA_LIKE | HYBRID,
    "qwen3_5_moe_text": MIXTURE | HYBRID | {"shared_expert_intermediate_size": 128},
    "phi3": LLAMA_LIKE | {"pad_token_id": 0},
    "gemma": LLAMA_LIKE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    # Two layers with keys and values of their own, and two that read those of the first two.
    "gemma4_text": LOCAL
    | GEMMA4
    | {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 32},
    "gemma4_unified_text": LOCAL
    | GEMMA4
    | {"attention_k_eq_v": True, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": LLAMA_LIKE
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    | {"logits_scaling": 4.0},
    "granite_swa": LOCAL
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    | {"logits_scaling": 4.0, "layer_types": ["sliding_attention", "full_attention"]},
    "granitemoe": OF_EXPERTS_ALONE | {"logits_scaling": 4.0},
    "granitemoeshared": OF_EXPERTS_ALONE | {"shared_intermediate_size": 128, "logits_scaling": 4.0},
    "granitemoehybrid": LLAMA_LIKE
    | {"layer_types": ["linear_attention", "full_attention"], "shared_intermediate_size": 192}
    | {"num_local_experts": 0, "mamba_n_heads": 4, "mamba_d_state": 16, "logits_scaling": 4.0},
    "smollm3": LLAMA_LIKE | TOKENS | {"no_rope_layer_interval": 2},
    "olmo": LLAMA_LIKE | TOKENS | {"clip_qkv": 2.0},
    "olmo2": LLAMA_LIKE | TOKENS,
    "olmoe": MIXTURE | TOKENS | {"intermediate_size": 64},
    "flex_olmo": MIXTURE | TOKENS | {"intermediate_size": 64},
    "glm4_moe": SHARED | {"first_k_dense_replace": 1},
    "glm4_moe_lite": LATENT | BALANCED | {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": LATENT | {"norm_topk_prob": False},
    "deepseek_v3": LATENT | BALANCED,
    "afmoe": MIXTURE
    | LOCAL
    | TOKENS
    | {"num_dense_layers": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1}
    | {"score_func": "sigmoid", "route_norm": True, "route_scale": 2.0, "mup_enabled": True}
    | {"layer_types": ["sliding_attention", "full_attention"]},
    "dots1": SHARED | {"first_k_dense_replace": 1},
    "solar_open": SHARED,
    "mixtral": OF_EXPERTS_ALONE,
    "minimax_m2": OF_EXPERTS_ALONE
    | TOKENS
    | {"rotary_dim": 32, "use_routing_bias": True, "scoring_func": "sigmoid"},
    "falcon_h1": LLAMA_LIKE
    | TOKENS
    | {"mamba_d_ssm": 256, "mamba_n_heads": 4, "mamba_d_state": 16, "mamba_rms_norm": True}
    | {"mamba_norm_before_gate": False}
    | {"embedding_multiplier": 3.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.7}
    | {"attention_in_multiplier": 0.8, "attention_out_multiplier": 1.2, "ssm_in_multiplier": 1.1}
    | {"ssm_out_multiplier": 0.9, "mlp_multipliers": [0.8, 1.2]}
    | {"ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 1.3]},
    "lfm2": LLAMA_LIKE
    | TOKENS
    | {"layer_types": ["conv", "full_attention"], "conv_dim": 128, "block_dim": 128}
    | {"block_auto_adjust_ff_dim": False},
    "lfm2_moe": MIXTURE
    | TOKENS
    | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mellum": MIXTURE | TOKENS | {"mlp_layer_types": ["sparse", "dense"]},
    "olmo3": LOCAL | TOKENS | {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": LLAMA_LIKE  # with a short window vLLM and Transformers disagree by one token
    | TOKENS
    | {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere2_moe": OF_EXPERTS_ALONE
    | TOKENS
    | {"num_experts": 4, "num_shared_experts": 1, "first_k_dense_replace": 1}
    | {"expert_selection_fn": "sigmoid"}
    | {"prefix_dense_intermediate_size": 192, "logit_scale": 0.25},
    "cohere": LLAMA_LIKE | TOKENS | {"logit_scale": 0.25},
    "glm": LLAMA_LIKE | TOKENS | {"attention_bias": True},
    "glm4": LLAMA_LIKE | TOKENS | {"attention_bias": True},
    "exaone4": LOCAL | {"sliding_window_pattern": 2},
    "exaone_moe": MIXTURE
    | LOCAL
    | {"sliding_window_pattern": 2, "first_k_dense_replace": 1, "num_shared_experts": 1},
    "ernie4_5": LLAMA_LIKE,
    "ernie4_5_moe": MIXTURE
    | TOKENS
    | {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1}
    | {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1},
    "seed_oss": LLAMA_LIKE,
    "hunyuan_v1_dense": LLAMA_LIKE,
    "hunyuan_v1_moe": LLAMA_LIKE
    | TOKENS
    | {"num_experts": 4, "moe_topk": [2, 1], "intermediate_size": 64},
    "apertus": LLAMA_LIKE,
    "arcee": LLAMA_LIKE | TOKENS,
    "jais2": LLAMA_LIKE | TOKENS,
    "nemotron": LLAMA_LIKE,
    "nemotron_h": LLAMA_LIKE
    | TOKENS
    | {"layers_block_type": ["linear_attention", "full_attention", "mlp", "moe"]}
    | {"num_hidden_layers": 4, "mamba_num_heads": 4, "mamba_head_dim": 64, "n_groups": 2}
    | {"ssm_state_size": 32, "moe_intermediate_size": 64, "n_routed_experts": 4}
    | {"moe_shared_expert_intermediate_size": 128, "num_experts_per_tok": 2},
    "starcoder2": LOCAL | TOKENS,
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 64, "init_std": 0.2},
    "gpt_neox": {"intermediate_size": 192, "initializer_range": 0.2},
}


def tiny_llama(**overrides: object) -> LlamaForCausalLM:
    """A random Llama."""
    return tiny_model("llama", **overrides)


def tiny_model(model_type: str, **overrides: object) -> Any:
    """A random model; weights are large enough for pruning to change the logits.

    Experts have linears of their own, as where a model is pruned.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(COMMON | SIZES[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    separate_experts(model)
    compute_as_engines(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():  # the bias of a router is no parameter
            if name.endswith(("bias", "sinks")):
                tensor.normal_(std=0.3)
            if name.endswith("dt_bias"):
                tensor[::2] -= 8  # small steps
    return model.float().eval()


def as_published(model: Any) -> Any:
    """The same model as Transformers has it, which saves experts as published checkpoints do."""
    whole = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype)
    state = model.state_dict()
    for path in list(fused_experts(whole)):
        experts = model.get_submodule(path)
        weights = [
            [one.weight for one in expert.children() if one is not expert.act_fn]
            for expert in experts
        ]
        first = "gate_up_proj" if len(weights[0]) == 3 else "up_proj"
        state[f"{path}.{first}"] = torch.stack([torch.cat(one[:-1]) for one in weights])
        state[f"{path}.down_proj"] = torch.stack([one[-1] for one in weights])
    whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    return whole.eval()


def fuse_experts(directory: Path, experts: str = "model.layers.{}.mlp.experts") -> None:
    """Store the experts of each decoder layer in two tensors, as some published mixtures do."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for layer in range(COMMON["num_hidden_layers"]):
        path = experts.format(layer)
        gates, ups, downs = (
            [tensors.pop(f"{path}.{n}.{kind}.weight") for n in range(MIXTURE["num_experts"])]
            for kind in ("gate_proj", "up_proj", "down_proj")
        )
        gate_ups = [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
        tensors[f"{path}.gate_up_proj"] = torch.stack(gate_ups)
        tensors[f"{path}.down_proj"] = torch.stack(downs)
    save_file(tensors, file, metadata={"format": "pt"})


def save_tokenizer(directory: Path) -> None:
    vocabulary = {"<unk>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(directory)


def random_text(words: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(WORDS), (words,), generator=generator).tolist()
    return " ".join(WORDS[index] for index in chosen)
