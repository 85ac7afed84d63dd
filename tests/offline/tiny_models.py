"""Tiny random models with a tokenizer and text."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

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
    "qwen3_moe": MIXTURE | {"mlp_only_layers": [1]},
    "qwen3_5_text": LLAMA_LIKE | HYBRID,
    "phi3": LLAMA_LIKE | {"pad_token_id": 0},
    "gemma": LLAMA_LIKE,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "granite": LLAMA_LIKE
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    | {"logits_scaling": 4.0},
    "granite_swa": LOCAL
    | {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1}
    | {"logits_scaling": 4.0, "layer_types": ["sliding_attention", "full_attention"]},
    "smollm3": LLAMA_LIKE | TOKENS | {"no_rope_layer_interval": 2},
    "olmo": LLAMA_LIKE | TOKENS | {"clip_qkv": 2.0},
    "olmo2": LLAMA_LIKE | TOKENS,
    "mixtral": OF_EXPERTS_ALONE,
    "olmo3": LOCAL | TOKENS | {"layer_types": ["sliding_attention", "full_attention"]},
    "cohere2": LLAMA_LIKE  # with a short window vLLM and Transformers disagree by one token
    | TOKENS
    | {"logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": LLAMA_LIKE | TOKENS | {"logit_scale": 0.25},
    "glm": LLAMA_LIKE | TOKENS | {"attention_bias": True},
    "glm4": LLAMA_LIKE | TOKENS | {"attention_bias": True},
    "exaone4": LOCAL | {"sliding_window_pattern": 2},
    "ernie4_5": LLAMA_LIKE,
    "seed_oss": LLAMA_LIKE,
    "hunyuan_v1_dense": LLAMA_LIKE,
    "apertus": LLAMA_LIKE,
    "arcee": LLAMA_LIKE | TOKENS,
    "jais2": LLAMA_LIKE | TOKENS,
    "nemotron": LLAMA_LIKE,
    "starcoder2": LOCAL | TOKENS,
    "opt": {"ffn_dim": 192, "word_embed_proj_dim": 64, "init_std": 0.2},
    "gpt_neox": {"intermediate_size": 192, "initializer_range": 0.2},
}


STRUCTURES = (
    *("llama", "gemma3_text", "olmo", "glm4", "phi3", "nemotron", "starcoder2", "opt", "gpt_neox"),
    *("qwen3_moe", "mixtral", "qwen3_5_text"),
)
"""One model type of each form of decoder layer; the others of the table have one of these."""


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
        state[f"{path}.gate_up_proj"] = torch.stack([torch.cat(one[:-1]) for one in weights])
        state[f"{path}.down_proj"] = torch.stack([one[-1] for one in weights])
    whole.load_state_dict({name: state[name] for name in whole.state_dict()})
    return whole.eval()


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
