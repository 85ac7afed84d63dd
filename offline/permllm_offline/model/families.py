"""The one table of model families, by ``config.model_type``.

A family says, relative to one decoder layer, which linears read the same tensor (a shared-input
group) and where the permutation of that tensor can be folded. Nothing else in this package knows
a module's name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from permllm_offline.model.common_groups import (
    Groups,
    after,
    attention,
    fused_gated_mlp,
    in_some_layers,
    mamba,
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
_CHANGED_VALUES = attention(*QKV, "self_attn.o_proj", proportional=False)
"""Values that are clipped, or have a norm, are no multiples of what they were."""
_FUSED_ATTENTION = (
    SharedInputGroup("qkv", ("self_attn.qkv_proj",)),
    SharedInputGroup(
        "o",
        ("self_attn.o_proj",),
        Fold.VALUE_HEADS,
        (RowPart("self_attn.qkv_proj", values_last, proportional=True),),
    ),
)
_LATENT = "self_attn.kv_a_proj_with_mqa"
"""What keys and values of all heads are made of (multi-head latent attention)."""
QUERIES_AT_ONCE = SharedInputGroup("qkv", ("self_attn.q_proj", _LATENT), norm=_NORMS["qkv"])
QUERIES_IN_STEPS = (
    SharedInputGroup("qkv", ("self_attn.q_a_proj", _LATENT), norm=_NORMS["qkv"]),
    SharedInputGroup("q_b", ("self_attn.q_b_proj",), norm="self_attn.q_a_layernorm"),
)
# No fold: rows before it are those of kv_b_proj, which engines take apart and multiply otherwise.
_LATENT_ATTENTION = (
    QUERIES_AT_ONCE,
    *QUERIES_IN_STEPS,
    SharedInputGroup("o", ("self_attn.o_proj",)),
)


_BARE_MLP = mlp("mlp")
_GATED_MLP = after(_NORMS, _BARE_MLP)
_ROUTERS = (r"re:.*\.mlp\.gate", r"re:.*\.mlp\.shared_expert_gate")
"""They have few rows, and decide where a token goes."""


def _mixture(*beside: SharedInputGroup, attention: Groups = _ATTENTION, **other: Any) -> Family:
    """Experts in ``mlp``, and what some layers have beside them or in their place."""
    usual = Family(
        "model.layers",
        (*attention, *in_some_layers(*beside)),
        ignore=("lm_head", *_ROUTERS),
        experts="mlp.experts",
    )
    return replace(usual, **other)


def _gated_hybrid(*read_by_linear_attention: str) -> Groups:
    """Attention with a gate in some layers, linear attention in the others."""
    return in_some_layers(
        SharedInputGroup("qkv", QKV),
        # Gated by other rows of q_proj: a fold would have to move those as well.
        SharedInputGroup("o", ("self_attn.o_proj",)),
        SharedInputGroup("qkvz", tuple(f"linear_attn.{one}" for one in read_by_linear_attention)),
        SharedInputGroup("linear_o", ("linear_attn.out_proj",)),
    )


_GATED_BESIDE = (
    SharedInputGroup("qkvg", (*QKV, "self_attn.gate_proj"), norm="input_layernorm"),
    # Gated by rows of the last one: a fold would have to move those as well.
    SharedInputGroup("o", ("self_attn.o_proj",)),
)
_LLAMA = Family("model.layers", _ATTENTION + _GATED_MLP, ignore=("lm_head",))
# Norms add 1 to their weight (Gemma), have none (OLMo), come after the linears, or are read by all.
_BARE_LLAMA = replace(_LLAMA, groups=_BARE_ATTENTION + _BARE_MLP)
_FUSED_MLP = after(_NORMS, fused_gated_mlp("mlp.gate_up_proj", "mlp.down_proj"))
_PHI3 = Family("model.layers", after(_NORMS, _FUSED_ATTENTION) + _FUSED_MLP, ignore=("lm_head",))
_GLM4 = Family("model.layers", _ATTENTION + _FUSED_MLP, ignore=("lm_head",))
MORE_TOKENS = ("mtp.", "model.mtp_")
"""What the names of modules begin with that predict several tokens, for engines that draft."""
MORE_TOKENS_IGNORED = r"re:(mtp\.|model\.mtp_).*"
_QWEN3_5_ATTENTION = _gated_hybrid("in_proj_qkv", "in_proj_z")
# Gates of linear attention have one row for each head, too little to prune.
_QWEN3_5_IGNORE = ("lm_head", r"re:.*\.linear_attn\.in_proj_[ab]", MORE_TOKENS_IGNORED)
_QWEN3_5 = Family(
    "model.layers",
    (*_QWEN3_5_ATTENTION, *_BARE_MLP),
    ignore=_QWEN3_5_IGNORE,
    recurrent="linear_attn.in_proj_qkv",
)
_GRANITE_ROUTER = r"re:.*\.block_sparse_moe\.router\.layer"
_GRANITE_MOE = _mixture(
    ignore=("lm_head", _GRANITE_ROUTER),
    experts="block_sparse_moe.experts",
    joined=True,
    renamed=(
        ("block_sparse_moe.router", "block_sparse_moe.router.layer"),
        ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.input_linear.weight"),
        ("block_sparse_moe.experts.down_proj", "block_sparse_moe.output_linear.weight"),
    ),
)
_GRANITE_MLP = fused_gated_mlp("shared_mlp.input_linear", "shared_mlp.output_linear")
_GRANITE_SHARED = replace(_GRANITE_MOE, groups=_ATTENTION + in_some_layers(*_GRANITE_MLP))
_MAMBA = mamba("mamba")
_GRANITE_HYBRID = replace(
    _GRANITE_MOE,
    groups=in_some_layers(*_MAMBA, *_ATTENTION) + _GRANITE_MLP,
    recurrent="mamba.in_proj",
)
_FALCON_H1 = Family(
    "model.layers",
    (*_BARE_ATTENTION, *_MAMBA, *after({"gate_up": "pre_ff_layernorm"}, mlp("feed_forward"))),
    ignore=("lm_head",),
    recurrent="mamba.in_proj",
    gives_tuples=True,
)
_TWO_LINEARS = ("up_proj", "down_proj")
# A layer is one thing alone: Mamba, attention, an MLP or experts, all of them its `mixer`.
_NEMOTRON_H = Family(
    "model.layers",
    in_some_layers(
        *mamba("mixer"),
        *attention(*(f"mixer.{one}_proj" for one in "qkvo")),
        *mlp("mixer", linears=_TWO_LINEARS),
        *mlp("mixer.shared_experts", "shared_", _TWO_LINEARS),
    ),
    # Experts of the largest read fewer channels: one linear each way is all that all of them share.
    ignore=(
        "lm_head",
        r"re:.*\.mixer\.gate",
        r"re:.*\.mixer\.fc[12]_latent_proj",
        MORE_TOKENS_IGNORED,
    ),
    experts="mixer.experts",
    expert_linears=_TWO_LINEARS,
    stored_layers="backbone.layers",
    recurrent="mixer.in_proj",
)
# What a token adds to each layer passes through few channels, and is dense in all.
_GEMMA4 = Family(
    "model.layers",
    after(
        {"qkv": "input_layernorm", "gate_up": "pre_feedforward_layernorm"},
        _CHANGED_VALUES + _BARE_MLP,
    ),
    ignore=(
        "lm_head",
        r"re:.*\.router\.proj",
        "model.per_layer_model_projection",
        r"re:.*\.per_layer_(input_gate|projection)",
    ),
    experts="experts",
    joined=True,
    by_token=("per_layer_input",),
    handed_on="shared_kv_states",
    sized_by_layers=("model.embed_tokens_per_layer", "model.per_layer_model_projection"),
)
_W = ("w1", "w3", "w2")
"""What some call gate, up, and what reads their products."""
_MIXTRAL = _mixture(
    ignore=("lm_head", r"re:.*\.block_sparse_moe\.gate"),
    expert_linears=_W,
    renamed=(("mlp", "block_sparse_moe"),),
)
_SHORT_CONVOLUTIONS = in_some_layers(
    *after({"qkv": "operator_norm"}, attention(*QKV, "self_attn.out_proj")),
    SharedInputGroup("conv_in", ("conv.in_proj",), norm="operator_norm"),
    # A fold would have to move the channels of the convolution as well.
    SharedInputGroup("conv_out", ("conv.out_proj",)),
)
_LFM2_MLP = after({"gate_up": "ffn_norm"}, mlp("feed_forward", linears=_W))
_LFM2 = Family("model.layers", (*_SHORT_CONVOLUTIONS, *_LFM2_MLP), ignore=("lm_head",))
_LFM2_MOE = _mixture(
    *_LFM2_MLP,
    attention=_SHORT_CONVOLUTIONS,
    ignore=("lm_head", r"re:.*\.feed_forward\.gate"),
    experts="feed_forward.experts",
    expert_linears=_W,
)
_SHARED_EXPERT = mlp("mlp.shared_expert", "shared_")
_SHARED_EXPERTS = mlp("mlp.shared_experts", "shared_")
_DEEPSEEK = _mixture(
    *_GATED_MLP,
    *_SHARED_EXPERTS,
    attention=_LATENT_ATTENTION,
    ignore=("lm_head", *_ROUTERS, r"re:.*\.kv_b_proj"),
)
_QWEN3_5_MOE = Family(
    "model.layers",
    (*_QWEN3_5_ATTENTION, *_SHARED_EXPERT),
    ignore=(*_QWEN3_5_IGNORE, *_ROUTERS),
    experts="mlp.experts",
    recurrent="linear_attn.in_proj_qkv",
)
_QWEN3_NEXT = Family(
    "model.layers",
    (*_gated_hybrid("in_proj_qkvz"), *in_some_layers(*_BARE_MLP, *_SHARED_EXPERT)),
    ignore=("lm_head", r"re:.*\.linear_attn\.in_proj_ba", *_ROUTERS, MORE_TOKENS_IGNORED),
    experts="mlp.experts",
    recurrent="linear_attn.in_proj_qkvz",
)
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
    "qwen2_moe": _mixture(*_GATED_MLP, *_SHARED_EXPERT),
    "qwen3_moe": _mixture(*_GATED_MLP),
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_5,
    "qwen3_5_moe_text": _QWEN3_5_MOE,
    "gemma": _BARE_LLAMA,
    "gemma2": _BARE_LLAMA,
    "gemma3_text": _BARE_LLAMA,
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": replace(_GEMMA4, experts=""),
    "granite": _LLAMA,
    "granite_swa": _LLAMA,
    "granitemoe": _GRANITE_MOE,
    "granitemoeshared": _GRANITE_SHARED,
    "granitemoehybrid": _GRANITE_HYBRID,
    "smollm3": _LLAMA,
    "olmo": replace(_BARE_LLAMA, groups=_CHANGED_VALUES + _BARE_MLP),
    "olmo2": _BARE_LLAMA,
    "olmo3": _BARE_LLAMA,
    "olmoe": _mixture(attention=after(_NORMS, _CHANGED_VALUES)),
    "flex_olmo": _mixture(attention=_BARE_ATTENTION),
    "mellum": _mixture(*_GATED_MLP),
    "mixtral": _MIXTRAL,
    "minimax_m2": _MIXTRAL,
    "falcon_h1": _FALCON_H1,
    "lfm2": _LFM2,
    "lfm2_moe": _LFM2_MOE,
    "cohere": _BARE_LLAMA,
    "cohere2": _BARE_LLAMA,
    "cohere2_moe": _mixture(*_BARE_MLP, *_SHARED_EXPERTS, attention=_BARE_ATTENTION),
    "exaone4": _BARE_LLAMA,
    "exaone_moe": _mixture(
        *_GATED_MLP,
        *_SHARED_EXPERTS,
        ignore=("lm_head", *_ROUTERS, MORE_TOKENS_IGNORED),
        renamed=(("mlp.gate.e_score_correction_bias", "mlp.e_score_correction_bias"),),
    ),
    "ernie4_5": _LLAMA,
    "ernie4_5_moe": _mixture(
        *_GATED_MLP,
        *_SHARED_EXPERTS,
        ignore=("lm_head", *_ROUTERS, MORE_TOKENS_IGNORED),
        renamed=(("mlp.gate.moe_statics", "mlp.moe_statics"),),
    ),
    "seed_oss": _LLAMA,
    "hunyuan_v1_dense": _LLAMA,
    "hunyuan_v1_moe": _mixture(
        *mlp("mlp.shared_mlp", "shared_"), ignore=("lm_head", r"re:.*\.mlp\.gate\.wg")
    ),
    "glm": _GLM4,
    "glm4_moe": _mixture(*_GATED_MLP, *_SHARED_EXPERTS),
    "glm4_moe_lite": _DEEPSEEK,
    "deepseek_v2": _DEEPSEEK,
    "deepseek_v3": _DEEPSEEK,
    "afmoe": _mixture(
        *after({"gate_up": "pre_mlp_layernorm"}, _BARE_MLP),
        *_SHARED_EXPERTS,
        attention=_GATED_BESIDE,
        ignore=("lm_head", r"re:.*\.mlp\.router\.gate"),
    ),
    "dots1": _mixture(*_GATED_MLP, *_SHARED_EXPERTS),
    "solar_open": _mixture(*_SHARED_EXPERTS),
    "glm4": _GLM4,
    "phi3": _PHI3,
    "apertus": _APERTUS,
    "arcee": _UP_DOWN,
    "jais2": _UP_DOWN,
    "nemotron": _BARE_UP_DOWN,
    "nemotron_h": _NEMOTRON_H,
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
