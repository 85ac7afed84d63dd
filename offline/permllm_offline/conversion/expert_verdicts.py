"""Treat the experts of a decoder layer alike: whoever serves them multiplies them as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from permllm_offline.conversion.group_verdict import GroupVerdict
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.renaming import Renamed, stored_part


def join_experts(verdicts: Sequence[GroupVerdict], renamed: Renamed = ()) -> list[GroupVerdict]:
    """Make the verdicts on the experts of one decoder layer agree; others stay as they are.

    Where one expert does not hold, none does, for the reason of the first. Where some experts are
    permuted, the others get the identity, and where one applies its permutation at run time, all
    do: gate and up apart from down. ``renamed`` is the family's, for the names in a reason.
    """
    left_dense: dict[str, str] = {}
    for verdict in verdicts:
        group = verdict.layout.group
        if group.experts and not verdict.holds:
            expert = stored_part(group.linears[0], renamed).rpartition(".")[0]
            left_dense.setdefault(
                group.experts,
                f"the experts of a layer are served as one, and {expert} cannot be sparse: "
                f"{verdict.reason}",
            )
    permuted = [verdict for verdict in verdicts if verdict.permutation is not None]
    permuted_kinds = {_kind(verdict) for verdict in permuted}
    run_time_kinds = {_kind(verdict) for verdict in permuted if not verdict.layout.folded}

    def joined(verdict: GroupVerdict) -> GroupVerdict:
        layout, kind = verdict.layout, _kind(verdict)
        if not layout.group.experts:
            return verdict
        if layout.group.experts in left_dense:
            reason = left_dense[layout.group.experts]
            return replace(verdict, permutation=None, reason=reason)
        if kind in permuted_kinds and verdict.permutation is None:
            verdict = replace(verdict, permutation=_identity(layout))
        if kind in run_time_kinds:
            verdict = replace(verdict, layout=layout.at_run_time())
        return verdict

    return [joined(verdict) for verdict in verdicts]


def _kind(verdict: GroupVerdict) -> tuple[str, bool]:
    """The experts that a group is of, and whether it is their gate and up."""
    group = verdict.layout.group
    return group.experts, group.reads_whole


def _identity(layout: GroupLayout) -> Tensor:
    """Leave every channel where it is: block-local uint8 [in], which is canonical."""
    return torch.arange(layout.block_size, dtype=torch.uint8).repeat(layout.num_blocks)
