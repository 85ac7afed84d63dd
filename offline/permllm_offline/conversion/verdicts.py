"""Judge every shared-input group of a source: does it obey the pattern?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Family
from permllm_offline.model.heads import heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.renaming import Renamed, stored_part
from permllm_vllm.checkpoint.pattern import Pattern

BLOCK_SIZE = 64
"""What a converted checkpoint says of permutations, of which it has none."""


@dataclass(frozen=True)
class GroupVerdict:
    """What was found out about the linears of one shared-input group of one decoder layer.

    ``reason`` says why the group does not obey the pattern; empty if it does. ``density`` is the
    share of weights that were kept, by linear.
    """

    layout: GroupLayout
    reason: str
    density: Mapping[str, float]

    @property
    def holds(self) -> bool:
        """Whether the group can be stored."""
        return not self.reason


class Judge:
    """Judges the groups of one source under one pattern."""

    def __init__(self, source: WeightSource, family: Family, config: Any, pattern: Pattern) -> None:
        self.source, self.family, self.config = source, family, config
        self.pattern = pattern
        self._stored = frozenset(source.names())

    def layer(self, index: int) -> list[GroupVerdict]:
        """Judge the groups of one decoder layer, and the experts of it alike.

        Raises:
            OfflineError: a linear of the family is not in the checkpoint, or not by itself.
        """
        stored, heads = self._stored, heads_of(self.config)

        def weight(linear: str) -> str:
            return self.family.stored_name(index, f"{linear}.weight")

        self._check_experts(index)
        verdicts = []
        for group in self.family.groups_of(lambda one: weight(one) in stored):
            names = list(map(weight, group.linears))
            missing = set(names) - stored
            if missing:
                raise OfflineError(
                    f"{sorted(missing)[0]} is not in the checkpoint, but its config.json makes it "
                    "a model that has it: fetch the checkpoint again."
                )
            layout = GroupLayout(group, self.source.header(names[0]).shape[1], BLOCK_SIZE, heads)
            kept = {
                linear: self.source.kept(name)
                for linear, name in zip(group.linears, names, strict=True)
            }
            verdicts.append(self._group(layout, kept))
        return join_experts(_settled(verdicts), self.family.renamed)

    def _check_experts(self, index: int) -> None:
        """Raise OfflineError for fused experts of another form, and where a layer has only some."""
        from permllm_vllm.hf.experts import FUSED

        experts, stored_name = self.family.experts, partial(self.family.stored_name, index)
        for kind in sorted(FUSED):
            name = stored_name(f"{experts}.{kind}")
            if experts and name in self._stored:
                raise OfflineError(
                    f"{name} holds all experts of its layer in a form that is not read: load the "
                    "model with transformers, `save_pretrained` it, and convert that."
                )
        first, *_, down = (
            stored_name(f"{experts}.0.{one}.weight") for one in self.family.expert_linears
        )
        if {first, down} <= self._stored:
            sizes = [self.source.header(name).shape for name in (first, down)]
            if sizes[0] != sizes[1][::-1]:
                raise OfflineError(
                    f"{first} is {list(sizes[0])} and {down} {list(sizes[1])}, which do not follow "
                    "one another: the experts are stored in a form that is not read. Load the "
                    "model with transformers, `save_pretrained` it, and convert that."
                )
        linears = [one for group in self.family.groups if group.experts for one in group.linears]
        missing = [one for one in linears if stored_name(f"{one}.weight") not in self._stored]
        if 0 < len(missing) < len(linears):
            first = stored_part(missing[0], self.family.renamed)
            raise OfflineError(
                f"{self.family.layer_name(index)} stores {len(linears) - len(missing)} of the "
                f"{len(linears)} linears of its experts, and not {first}: a decoder layer has all "
                "experts that its config.json counts, or none. Fetch the checkpoint again."
            )

    def _group(self, layout: GroupLayout, kept: Mapping[str, Tensor]) -> GroupVerdict:
        density = {linear: share_of_kept(one) for linear, one in kept.items()}
        most, reason = self.pattern.kept / self.pattern.group, ""
        full = [linear for linear, share in density.items() if share > most]
        if layout.in_features % self.pattern.multiple:
            reason = (
                f"{layout.in_features} input channels, which is no multiple of "
                f"{self.pattern.multiple}"
            )
        elif full:
            first = stored_part(full[0], self.family.renamed)
            reason = f"{first} keeps {density[full[0]]:.1%} of its weights, more than {most:.0%}"
        elif not all(obeys(one, self.pattern) for one in kept.values()):
            reason = f"not {self.pattern} in the order in which channels are stored"
        return GroupVerdict(layout, reason, density)


def obeys(kept: Tensor, pattern: Pattern) -> bool:
    """Whether no group of a kept set, bool [rows, in], keeps more than N."""
    if kept.shape[1] % pattern.group:
        return False
    counts = kept.view(len(kept), -1, pattern.group).sum(dim=2)
    return bool((counts <= pattern.kept).all())


def share_of_kept(kept: Tensor) -> float:
    """Share of the weights that a kept set `[out, in]` keeps, 0..1, counted in integers."""
    return int(kept.count_nonzero()) / max(1, kept.numel())


def join_experts(verdicts: Sequence[GroupVerdict], renamed: Renamed = ()) -> list[GroupVerdict]:
    """Leave all experts of a decoder layer dense where one cannot be sparse, for its reason.

    Whoever serves them multiplies them as one. ``renamed`` is the family's, for names in a reason.
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
    return [
        replace(verdict, reason=left_dense.get(verdict.layout.group.experts, verdict.reason))
        for verdict in verdicts
    ]


def _settled(verdicts: Sequence[GroupVerdict]) -> list[GroupVerdict]:
    """Let no smoothing move into rows of this layer that are not sparse."""
    sparse = {linear for verdict in verdicts if verdict.holds for linear in verdict.density}
    return [
        verdict
        if sparse.issuperset(part.linear for part in verdict.layout.group.fold_into)
        else replace(verdict, layout=verdict.layout.at_run_time())
        for verdict in verdicts
    ]
