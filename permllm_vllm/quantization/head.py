"""The method of embeddings and the output head, which stay dense."""

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.nn import Module

from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import PackedWeights
from permllm_vllm.compat import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
    get_current_vllm_config_or_none,
    init_logger,
)
from permllm_vllm.quantization.drafts import builds_draft
from permllm_vllm.quantization.options import serving_options

logger = init_logger("vllm.permllm.head")
_head_linear = torch.ops.permllm.head_linear.default
_packed_linear = torch.ops.permllm.sparse_linear.default
PACKED = "cpu_linear"
"""Attribute of a layer by which vLLM multiplies with its packed copy of the weight."""
COPY = "permllm_copy"
"""Attribute of a layer that holds our packed copy, None where there can be none."""
COPIED_BY = "permllm_copied_by"
"""Attribute of a weight: the layers that have packed copies of it, several where it is tied."""


def head_tokens(weight: Tensor) -> int:
    """Tokens that the compiled kernel multiplies with a dense head at most; 0 where there is none.

    There is one for bfloat16 on CPUs with AVX-512 BF16, for float16 on those of them without AMX,
    and for both on those with AVX2 and no AVX-512, where outputs are a multiple of 8 and inputs of
    64. Of the weight `[out, in]` its device, dtype and shape count.
    """
    return int(torch.ops.permllm.cpu_head_tokens(*_kind(weight))) if _has_kernels(weight) else 0


def copied_tokens(weight: Tensor) -> int:
    """Tokens up to which a head's copy in 12 bits is multiplied faster than the weight itself.

    Of more, up to `head_tokens`, the weight is, where it stands. Its device, dtype and shape count.
    """
    if not _has_kernels(weight):
        return 0
    return int(torch.ops.permllm.cpu_head_copied_tokens(*_kind(weight)))


def can_round(weight: Tensor) -> bool:
    """Whether a head of such a weight `[out, in]` can be multiplied as int8."""
    return _has_kernels(weight) and CpuBackend().rounds_dense(weight.shape[1])


def _kind(weight: Tensor) -> tuple[int, int, bool]:
    """What the compiled library wants to know of a weight: outputs, inputs, and if float16."""
    outputs, inputs = weight.shape
    return outputs, inputs, weight.dtype == torch.float16


def _has_kernels(weight: Tensor) -> bool:
    """Whether the compiled kernels serve where the weight lies, and take activations of its dtype.

    vLLM sets the device of what is created, but only while it builds a model, not while it loads.
    """
    on_cpu = weight.device.type == "cpu"
    return not ops.missing_reason and on_cpu and weight.dtype in (torch.bfloat16, torch.float16)


class HeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's method of dense embeddings, with kernels of its own for bfloat16 and float16.

    vLLM packs a second copy of every embedding, of those too that no output head uses. Here a head
    has a copy in 12 bits a value where this instruction set has kernels for it, made when its
    weight is loaded, so that vLLM counts it before it gives the KV cache what is left; where the
    weight itself is faster with some number of tokens, it is multiplied. Elsewhere a
    kernel takes few tokens, or any number, where the weight stands, in huge pages, and vLLM's copy
    is made when more tokens come for the first time: while vLLM warms up or, as it does not warm up
    an eager model, in the first such step.

    An embedding that serves as a head itself is told apart by `adopt_heads`, where all of a model
    is on one rank; else its copy is made in the first step.

    A tied head shares the weight of an embedding. New weights for a running model reach the
    embedding alone, with whose method every copy of its weight goes.

    Args:
        rounded: whether the copy is one of int8 values, where it can be: it loses something.
        asked: whether a user wants that, and is told where it cannot be.
        copied: whether there is a copy at all, of no use where vLLM itself multiplies the weight.

    Attributes:
        multiplies: whether an embedding is known to serve as a head.
        tokens: that the kernel takes at most with this weight as it stands, 0 where there is none.
        copied_tokens: up to which a copy without loss is faster than that kernel.
    """

    def __init__(self, *, rounded: bool = False, asked: bool = False, copied: bool = True) -> None:
        super().__init__()
        self.tokens = self.copied_tokens = 0
        self._copied = copied
        self._to_be_rounded, self._asked = rounded, asked
        self._rounds = False
        self._copied_by: WeakSet[Any] = WeakSet()
        self.multiplies = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Let vLLM register its weight, in huge pages where the kernel will read it."""
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra_weight_attrs,
        )
        self._begin(layer, loaded=False)

    def adopt(self, layer: Any) -> None:
        """Take over a layer that has its weight, from vLLM's own method."""
        self._begin(layer, loaded=True)
        layer.quant_method = self

    def _begin(self, layer: Any, *, loaded: bool) -> None:
        """Find out what multiplies, and let the weight lie where a kernel will read it."""
        weight = layer.weight.data
        self.tokens, self.copied_tokens = head_tokens(weight), copied_tokens(weight)
        self._rounds = self._to_be_rounded and can_round(weight)
        if self.tokens:
            memory = torch.ops.permllm.cpu_huge_bytes(weight.nbytes)
            layer.weight.data = memory.view(weight.dtype).view(weight.shape)
            if loaded:
                layer.weight.data.copy_(weight)
        self._copied_by = layer.weight.__dict__.setdefault(COPIED_BY, self._copied_by)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Forget what was packed of other weights, and pack those of a head."""
        for other in {layer, *self._copied_by}:
            other.__dict__.pop(COPY, None)
            other.__dict__.pop(PACKED, None)
        if not (self.tokens or self._rounds):
            self._let_vllm_pack(layer)
        if self.multiplies or isinstance(layer, ParallelLMHead):
            self._pack(layer)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in]` times the weight: `[..., out]`, in x's dtype."""
        layer = getattr(layer, "base_layer", layer)  # an embedding that vLLM wraps for adapters
        if COPY not in layer.__dict__:
            self._pack(layer)
        packed = layer.__dict__[COPY]
        tokens = x.numel() // x.shape[-1]
        in_place = bias is None and tokens <= self.tokens
        if packed is not None and (self._rounds or not in_place or tokens <= self.copied_tokens):
            outputs = layer.weight.shape[0]
            return _packed_linear(
                x, packed.packed, packed.metadata, None, packed.scale, bias, outputs, "dense"
            )
        if in_place:
            return _head_linear(x, layer.weight)
        if layer.weight.is_cpu and PACKED not in layer.__dict__:
            self._let_vllm_pack(layer)
        return super().apply(layer, x, bias)

    def _pack(self, layer: Any) -> None:
        """Make our own copy, or note that there is none."""
        self._remember(layer)
        layer.__dict__[COPY] = self._copy(layer.weight)

    def _let_vllm_pack(self, layer: Any) -> None:
        """Have vLLM's own copy made, where it has one."""
        self._remember(layer)
        super().process_weights_after_loading(layer)

    def _remember(self, layer: Any) -> None:
        """Note that the layer has a copy of its weight, which may be that of another layer."""
        getattr(layer.weight, COPIED_BY, self._copied_by).add(layer)

    def _copy(self, weight: Tensor) -> PackedWeights | None:
        """Our copy of a weight, where there is a kernel for it: as asked, or without loss."""
        if not self._copied:
            return None
        if self._rounds:
            return CpuBackend().round_dense(weight)
        if self._asked:
            logger.warning(
                "the output head, %s of %d inputs on %s, stays as it is: one of int8 takes an "
                "x86 CPU with AVX2 (and no PERMLLM_CPU_ISA=portable), and a weight of bfloat16 or "
                "float16 whose inputs are a multiple of 8 and not too many",
                *(str(weight.dtype).removeprefix("torch."), weight.shape[1], weight.device.type),
            )
        return CpuBackend().pack_dense(weight) if self.tokens else None


def head_method() -> HeadMethod:
    """The method of an embedding or a head, as the options of the engine ask.

    The head of a draft is rounded unless they ask for a dense one: a draft decides no token.

    With a `head_dtype` that is not the model's dtype, vLLM multiplies the weight itself and asks no
    method.
    """
    option = serving_options().head
    asked = option == "int8"
    model = getattr(get_current_vllm_config_or_none(), "model_config", None)
    if model is None or model.head_dtype == model.dtype:
        rounded = asked or (option is None and builds_draft())
        return HeadMethod(rounded=rounded, asked=asked)
    if asked:
        logger.warning_once(
            "the output head is not rounded to int8: vLLM multiplies it as it is, in %s (its "
            "head_dtype) where the model has %s. To round it, pass --hf-overrides "
            """'{"head_dtype": "model"}'""",
            *(str(dtype).removeprefix("torch.") for dtype in (model.head_dtype, model.dtype)),
        )
    return HeadMethod(copied=False)


def adopt_heads(model: Module, *, generates: bool = False) -> None:
    """Serve the embeddings and heads of which a model's class did not ask the plugin.

    Args:
        model: loaded.
        generates: whether it has a head, on this rank: of a model that generates text and has one
            embedding and no layer for a head, the embedding is.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    for layer in layers:
        if type(getattr(layer, "quant_method", None)) is UnquantizedEmbeddingMethod:
            head_method().adopt(layer)
    if generates and len(layers) == 1 and not isinstance(layers[0], ParallelLMHead):
        method = layers[0].quant_method
        if isinstance(method, HeadMethod):
            method.multiplies = True
