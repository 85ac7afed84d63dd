"""Scores of the linears of a shared-input group, in a decoder layer that is in memory."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import linear_of
from permllm_offline.sparsity.importance import Importance, Scores


def group_scores(
    importance: Importance,
    layer: nn.Module,
    layout: GroupLayout,
    norms: Mapping[str, Tensor] | None,
) -> dict[str, Scores]:
    """Scores of every weight of a group, computed where they are asked for.

    Args:
        importance: the entry of the table.
        layer: the decoder layer, dense.
        layout: of the group.
        norms: group -> float32 [in_features] as in ``DenseStatistics``, or None where none were
            measured.

    Returns:
        linear -> scores [out_features, in_features].
    """
    norm = None if norms is None else norms[layout.group.name]
    return {
        linear: importance.score(linear_of(layer, linear).weight, norm)
        for linear in layout.group.linears
    }
