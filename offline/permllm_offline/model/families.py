"""The one table of model families, by ``config.model_type``.

A family says, relative to one decoder layer, which linears read the same tensor (a shared-input
group) and where the permutation of that tensor can be folded. Nothing else in this package knows
a module's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from permllm_offline.model.common_groups import (
    after,
    attention,
    fused_gated_mlp,
    in_some_layers,
    mlp,
    plain_mlp,
)
from permllm_offline.model.family import Family, Fold, SharedInputGroup
from permllm_offline.model.row_parts import RowPart, values_last, values_of_each_head

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_NORMS = {
    "qkv": "input_layernorm",
    "gate_up": "post_attention_layernorm",
    "fc1": "post_attention_layernorm",
}
"""What most families call the norms that these groups alone read, and whose weights multiply."""
_BARE_ATTENTION = attention(*QKV, "self_attn.o_proj")
_ATTENTION = after(_NORMS, _BARE_ATTENTION)
_FUSED_ATTENTION = (
    SharedInputGroup("qkv", ("self_attn.qkv_proj",)),
    SharedInputGroup(
        "o",
        ("self_attn.o_proj",),
        Fold.VALUE_HEADS,
        (RowPart("self_attn.qkv_proj", values_last, proportional=True),),
    ),
)

_BARE_MLP = mlp("mlp")
_GATED_MLP = after(_NORMS, _BARE_MLP)
_LLAMA = Family("model.layers", _ATTENTION + _GATED_MLP, ignore=("lm_head",))
# Norms add 1 to their weight (Gemma), have none (OLMo), come after the linears, or are read by all.
_BARE_LLAMA = replace(_LLAMA, groups=_BARE_ATTENTION + _BARE_MLP)
_FUSED_MLP = after(_NORMS, fused_gated_mlp("mlp.gate_up_proj", "mlp.down_proj"))
_PHI3 = Family("model.layers", after(_NORMS, _FUSED_ATTENTION) + _FUSED_MLP, ignore=("lm_head",))
_GLM4 = Family("model.layers", _ATTENTION + _FUSED_MLP, ignore=("lm_head",))
MORE_TOKENS = "mtp."
"""What the names of modules begin with that predict several tokens, for engines that draft."""
_QWEN3_5 = Family(
    "model.layers",
    (
        *in_some_layers(
            SharedInputGroup("qkv", QKV),
            # Gated by other rows of q_proj: a fold would have to move those as well.
            SharedInputGroup("o", ("self_attn.o_proj",)),
            SharedInputGroup("qkvz", ("linear_attn.in_proj_qkv", "linear_attn.in_proj_z")),
            SharedInputGroup("linear_o", ("linear_attn.out_proj",)),
        ),
        *_BARE_MLP,
    ),
    # Gates of linear attention have one row for each head, too little to prune.
    ignore=("lm_head", r"re:.*\.linear_attn\.in_proj_[ab]", r"re:mtp\..*"),
    recurrent="linear_attn.in_proj_qkv",
)
# Some layers of Qwen's have an MLP in the place of experts. Routers have few rows.
_QWEN3_MOE = Family(
    "model.layers",
    (*_ATTENTION, *in_some_layers(*_GATED_MLP)),
    ignore=("lm_head", r"re:.*\.mlp\.gate"),
    experts="mlp.experts",
)
_MIXTRAL = Family(
    "model.layers",
    _ATTENTION,
    ignore=("lm_head", r"re:.*\.block_sparse_moe\.gate"),
    experts="mlp.experts",
    expert_linears=("w1", "w3", "w2"),
    renamed=(("mlp", "block_sparse_moe"),),
)
_TWO_LINEARS = ("up_proj", "down_proj")
_BARE_UP_DOWN = Family(
    "model.layers", _BARE_ATTENTION + mlp("mlp", linears=_TWO_LINEARS), ignore=("lm_head",)
)
_UP_DOWN = replace(_BARE_UP_DOWN, groups=after(_NORMS, _BARE_UP_DOWN.groups))
_APERTUS = replace(
    _BARE_UP_DOWN,
    groups=after(
        {"qkv": "attention_layernorm", "fc1": "feedforward_layernorm"}, _BARE_UP_DOWN.groups
    ),
)
_STARCODER2 = Family(
    "model.layers",
    after(_NORMS, _BARE_ATTENTION + mlp("mlp", linears=("c_fc", "c_proj"))),
    ignore=("lm_head",),
)
# Its norms come after the linears in some of its sizes.
_OPT = Family(
    "model.decoder.layers",
    (
        *attention(*QKV, "self_attn.out_proj"),
        *plain_mlp("fc1", "fc2"),
    ),
    ignore=("lm_head", "model.decoder.project_in", "model.decoder.project_out"),
)
_GPT_NEOX = Family(
    "gpt_neox.layers",
    after(
        _NORMS,
        (
            SharedInputGroup("qkv", ("attention.query_key_value",)),
            SharedInputGroup(
                "o",
                ("attention.dense",),
                Fold.VALUE_HEADS,
                (RowPart("attention.query_key_value", values_of_each_head, proportional=True),),
            ),
            *mlp("mlp", linears=("dense_h_to_4h", "dense_4h_to_h")),
        ),
    ),
    ignore=("lm_head", "embed_out"),
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "cwm": _LLAMA,
    "helium": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "ministral3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_5_text": _QWEN3_5,
    "gemma": _BARE_LLAMA,
    "gemma2": _BARE_LLAMA,
    "gemma3_text": _BARE_LLAMA,
    "granite": _LLAMA,
    "granite_swa": _LLAMA,
    "smollm3": _LLAMA,
    "olmo": replace(
        # Values that are clipped are no multiples of what they were.
        _BARE_LLAMA,
        groups=attention(*QKV, "self_attn.o_proj", proportional=False) + _BARE_MLP,
    ),
    "olmo2": _BARE_LLAMA,
    "olmo3": _BARE_LLAMA,
    "mixtral": _MIXTRAL,
    "cohere": _BARE_LLAMA,
    "cohere2": _BARE_LLAMA,
    "exaone4": _BARE_LLAMA,
    "ernie4_5": _LLAMA,
    "seed_oss": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "glm": _GLM4,
    "glm4": _GLM4,
    "phi3": _PHI3,
    "apertus": _APERTUS,
    "arcee": _UP_DOWN,
    "jais2": _UP_DOWN,
    "nemotron": _BARE_UP_DOWN,
    "starcoder2": _STARCODER2,
    "opt": _OPT,
    "gpt_neox": _GPT_NEOX,
}

WRAPPINGS: Sequence[tuple[str, str]] = (
    ("model.language_model", "lm_head"),
    ("language_model.model", "language_model.lm_head"),
    ("model.text_model", "lm_head"),
    ("model", "lm_head"),
)
"""What checkpoints of text and images call ``model`` and ``lm_head`` of their language model."""

SAME_ON_TEXT: Mapping[str, str] = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
"""Language models that are those of a family as long as no image is among their tokens."""
