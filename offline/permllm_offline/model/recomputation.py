"""Trade time for memory in a backward pass: compute activations again instead of keeping them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

from permllm_offline.model.float32_products import contexts_of_recomputation
from permllm_offline.model.prune_plan import Plan, PlannedLinear, between_bytes

Checkpointing = Literal["auto", "always", "never"]
"""Whether a backward pass computes activations again in place of keeping them."""

RECOMPUTE_ABOVE_BYTES = 8 << 30
"""Activations of one backward pass above which those inside decoder layers are not kept."""


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Keep no activations inside a decoder layer; compute them again in the backward pass."""
    originals: list[Callable[..., Any]] = [layer.forward for layer in layers]
    try:
        for layer, forward in zip(layers, originals, strict=True):
            layer.forward = partial(
                checkpoint, forward, use_reentrant=False, context_fn=contexts_of_recomputation
            )
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def activations_are_large(plan: Plan, tokens: int, item: int, share: float = 1.0) -> bool:
    """Whether a backward pass over so many tokens at once should recompute activations.

    Args:
        plan: of the model.
        tokens: in the pass.
        item: bytes of a number.
        share: of the decoder layers that the pass goes through.
    """
    return share * activation_bytes(plan.every_linear, tokens, item) > RECOMPUTE_ABOVE_BYTES


def activation_bytes(linears: Sequence[PlannedLinear], tokens: int, item: int) -> int:
    """Estimate what a backward pass over these linears keeps of the forward pass."""
    beside = sum(linear.kept_beside for linear in linears)
    return round((between_bytes(linears, item) + beside) * tokens)


def held_activation_bytes(
    plan: Plan,
    tokens: int,
    item: int,
    share: float = 1.0,
    checkpointing: Checkpointing = "auto",
) -> int:
    """What is in memory of that where activations are recomputed, layer by layer.

    Args:
        plan: of the model.
        tokens: in the pass.
        item: bytes of a number.
        share: of the decoder layers that the pass goes through.
        checkpointing: whether they are: ``auto`` where they are large.
    """
    whole = activation_bytes(plan.every_linear, tokens, item)
    recompute = checkpointing == "always" or (
        checkpointing == "auto" and share * whole > RECOMPUTE_ABOVE_BYTES
    )
    if not recompute:
        return round(share * whole)
    between_layers = len(plan.layers) * tokens * plan.hidden_size * item
    largest = max(activation_bytes(linears, tokens, item) for linears in plan.all_by_layer)
    return round(largest + share * between_layers)
