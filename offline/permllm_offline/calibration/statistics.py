"""What calibration reads from the dense model: input norms, and its last hidden state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.calibration.unreached_experts import (
    count_unreached,
    warn_unreached,
    with_stand_ins,
)
from permllm_offline.model.family import Family, SharedInputGroup
from permllm_offline.model.modules import decoder_layers, has_module


@dataclass(frozen=True)
class DenseStatistics:
    """Results of one pass of the dense model over the calibration windows.

    ``norms[layer][group]`` is float32 [in_features]: the root mean square of each input channel
    over all tokens, i.e. the norm of Wanda up to one common factor. ``hidden_states`` is
    [windows, sequence_length, hidden] in the model's dtype, or None when not asked for. All are on
    the CPU.
    """

    norms: list[dict[str, Tensor]]
    hidden_states: Tensor | None


@torch.inference_mode()
def collect(
    model: Any,
    family: Family,
    windows: Tensor,
    *,
    hidden_states: bool,
    groups: Sequence[Sequence[SharedInputGroup]] | None = None,
) -> DenseStatistics:
    """Run the dense model over int64 [windows, sequence_length], one window at a time.

    ``groups`` are those of each decoder layer that are measured, by default all.
    """
    layers = decoder_layers(model, family.layers)
    if groups is None:
        groups = [family.groups_of(partial(has_module, layer)) for layer in layers]
    kept: list[Tensor] = []
    with ExitStack() as stack:
        sums = [
            stack.enter_context(summed_squares(layer, own))
            for layer, own in zip(layers, groups, strict=True)
        ]
        for window in tqdm(windows, desc="dense forward", unit="window"):
            state = last_hidden_state(model, family, window[None])
            if hidden_states:
                kept.append(state.cpu())
    warn_unreached([count_unreached(*pair) for pair in zip(groups, sums, strict=True)])
    norms = [
        mean_norms(layer, own, mine, windows.numel())
        for layer, own, mine in zip(layers, groups, sums, strict=True)
    ]
    return DenseStatistics(norms, torch.cat(kept) if kept else None)


def mean_norms(
    layer: nn.Module,
    groups: Sequence[SharedInputGroup],
    squares: Mapping[str, Tensor],
    tokens: int,
) -> dict[str, Tensor]:
    """Group -> float32 [in_features] as in ``DenseStatistics``, from squares summed over tokens.

    Those of an expert are over all tokens too, of which others than its own count as zeros: it is a
    factor common to its channels.
    """
    norms = {name: (total / tokens).sqrt().cpu() for name, total in squares.items()}
    return with_stand_ins(layer, groups, norms)


@contextmanager
def summed_squares(
    layer: nn.Module, groups: Sequence[SharedInputGroup]
) -> Iterator[dict[str, Tensor]]:
    """Collect group -> float32 [in_features], squares of its input summed over the tokens run.

    A group is absent while it has seen none. What the module of all experts reads is summed up
    under the name of that.
    """
    sums: dict[str, Tensor] = {}
    read = {group.name: group.linears[0] for group in groups}
    read |= {group.experts: group.experts for group in groups if group.reads_whole}
    handles = [
        layer.get_submodule(module).register_forward_pre_hook(_sum_squares(sums, name))
        for name, module in read.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def last_hidden_state(model: Any, family: Family, windows: Tensor) -> Tensor:
    """Return the hidden state after the last decoder layer, before the final norm.

    Args:
        model: causal language model of transformers.
        family: names of its modules.
        windows: int64 [batch, sequence_length].

    Returns:
        [batch, sequence_length, hidden] in the model's dtype, differentiable.
    """
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: Sequence[Tensor], output: Tensor) -> None:
        captured.append(output)

    handle = decoder_layers(model, family.layers)[-1].register_forward_hook(capture)
    try:
        model.base_model(windows.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def _sum_squares(sums: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Sequence[Tensor]) -> None:
        squares = inputs[0].flatten(0, -2).float().square().sum(0)
        sums[name] = sums[name] + squares if name in sums else squares

    return hook
