"""Experts of a mixture that no token of the calibration text reached."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from permllm_offline.model.family import SharedInputGroup
from permllm_offline.model.modules import linear_of

logger = logging.getLogger(__name__)


class Unreached(NamedTuple):
    """Of a decoder layer: how many experts no token reached, of how many."""

    missed: int
    experts: int


def count_unreached(groups: Sequence[SharedInputGroup], measured: Collection[str]) -> Unreached:
    """Count the experts of a decoder layer.

    Args:
        groups: of the layer.
        measured: names of those that any token came to.
    """
    experts = [group.name for group in groups if group.reads_whole]
    return Unreached(sum(name not in measured for name in experts), len(experts))


def with_stand_ins(
    layer: nn.Module, groups: Sequence[SharedInputGroup], norms: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Give norms to the groups of experts that no token reached.

    What reads the tokens as they come to the experts gets the norms of all of these, what reads
    products inside an expert one for each channel.

    Args:
        layer: the decoder layer.
        groups: of the layer.
        norms: group, or module of all experts -> float32 [in_features].

    Returns:
        The norms of every group.
    """

    def stand_in(group: SharedInputGroup) -> Tensor:
        if group.reads_whole:
            return norms[group.experts].clone()  # files of tensors take none that share memory
        return torch.ones(linear_of(layer, group.linears[0]).in_features)

    return {
        group.name: norms[group.name] if group.name in norms else stand_in(group)
        for group in groups
    }


def warn_unreached(found: Sequence[Unreached]) -> None:
    """Say once how many experts of a model were pruned without a token of their own.

    Args:
        found: of each decoder layer.
    """
    missed = sum(layer.missed for layer in found)
    if not missed:
        return
    layers = ", ".join(str(index) for index, layer in enumerate(found) if layer.missed)
    logger.warning(
        "%d of %d experts (decoder layers %s) got no token of the calibration text: they are "
        "pruned by the norms of what all experts of their layer read, and by magnitude. Give more "
        "--num-samples, or more varied text",
        missed,
        sum(layer.experts for layer in found),
        layers,
    )
