"""Judge every shared-input group of a source: in which channel order does it obey the pattern?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from permllm_offline.conversion.expert_verdicts import join_experts
from permllm_offline.conversion.folds import agrees
from permllm_offline.conversion.group_verdict import GroupVerdict
from permllm_offline.conversion.recovery import obeys, recover_permutation
from permllm_offline.conversion.smallest_block import BlockSearch
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Family, Fold
from permllm_offline.model.heads import heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.renaming import stored_part
from permllm_vllm.checkpoint.pattern import Pattern


class Judge:
    """Judges the groups of one source under one pattern and block size; judges share a `search`."""

    def __init__(
        self,
        source: WeightSource,
        family: Family,
        config: Any,
        pattern: Pattern,
        block_size: int,
        search: BlockSearch,
    ) -> None:
        self.source, self.family, self.config = source, family, config
        self.pattern, self.block_size = pattern, block_size
        self.search = search
        self._stored = frozenset(source.names())

    def layer(self, index: int) -> list[GroupVerdict]:
        """Judge the groups of one decoder layer, settle which permutations fold, join experts.

        Raises:
            OfflineError: a linear of the family is not in the checkpoint, or not by itself.
        """
        stored, heads = self._stored, heads_of(self.config, index)

        def weight(linear: str) -> str:
            return self.family.stored_name(index, f"{linear}.weight")

        self._check_experts(index)
        verdicts = []
        for group in self.family.groups_of(index, lambda one: weight(one) in stored):
            names = list(map(weight, group.linears))
            missing = set(names) - stored
            if missing:
                raise OfflineError(
                    f"{sorted(missing)[0]} is not in the checkpoint, but its config.json makes it "
                    "a model that has it: fetch the checkpoint again."
                )
            layout = GroupLayout(
                group, self.source.header(names[0]).shape[1], self.block_size, heads
            )
            kept = {
                linear: self.source.kept(name)
                for linear, name in zip(group.linears, names, strict=True)
            }
            verdicts.append(self._group(names[0], layout, kept))
        return join_experts(settle_folds(verdicts), self.family.renamed)

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

    def _group(self, name: str, layout: GroupLayout, kept: Mapping[str, Tensor]) -> GroupVerdict:
        density = {linear: share_of_kept(one) for linear, one in kept.items()}
        if layout.in_features % self.pattern.multiple:
            reason = (
                f"{layout.in_features} input channels, which is no multiple of "
                f"{self.pattern.multiple}"
            )
            return GroupVerdict(layout, None, reason, density)
        most = self.pattern.kept / self.pattern.group
        full = [linear for linear, share in density.items() if share > most]
        if full:
            first = stored_part(full[0], self.family.renamed)
            reason = f"{first} keeps {density[full[0]]:.1%} of its weights, more than {most:.0%}"
            return GroupVerdict(layout, None, reason, density)
        rows = torch.cat(list(kept.values()))
        if obeys(rows, self.pattern, None, 0):
            return GroupVerdict(layout, None, "", density)
        if self.pattern.group >= self.block_size:  # where no order changes what a group keeps
            return GroupVerdict(layout, None, f"not {self.pattern}", density)
        if layout.in_features % self.block_size:
            reason = (
                f"not {self.pattern} in the original order, and {layout.in_features} input channels"
                f" are no multiple of the block size {self.block_size}"
            )
            return GroupVerdict(layout, None, reason, density)
        permutation = self._recover(layout, rows)
        reason = "" if permutation is not None else self._explain(name, layout, kept, rows)
        return GroupVerdict(layout, permutation, reason, density)

    def _recover(self, layout: GroupLayout, rows: Tensor) -> Tensor | None:
        """Prefer one that folds: equal in all blocks that one value head feeds."""
        if layout.folded and layout.group.fold is Fold.VALUE_HEADS:
            tied = recover_permutation(rows, self.pattern, self.block_size, layout.ties())
            if tied is not None:
                return tied
        return recover_permutation(rows, self.pattern, self.block_size)

    def _explain(
        self, name: str, layout: GroupLayout, kept: Mapping[str, Tensor], rows: Tensor
    ) -> str:
        """Say what the zeros look like instead, as far as it can be told."""
        if len(kept) > 1 and all(self._recover(layout, one) is not None for one in kept.values()):
            names = ", ".join(stored_part(one, self.family.renamed) for one in kept)
            return (
                f"{names} obey {self.pattern} each in an order of its own, and linears "
                "that read one input share one order in this format"
            )
        nothing = f"not {self.pattern} in any order inside blocks of {self.block_size} channels"
        block = self.search.smallest_block(name, rows, self.pattern)
        if block is None:
            return nothing
        if block < layout.in_features:
            return f"{nothing}, but in blocks of {block}: see --block-size"
        return (
            f"it obeys {self.pattern} in an order over all channels (as RIA's channel permutation "
            f"leaves it); this format moves channels inside blocks of {self.block_size}, which is "
            "what runs fused in a kernel"
        )


def share_of_kept(kept: Tensor) -> float:
    """Share of the weights that a kept set `[out, in]` keeps, 0..1, counted in integers."""
    return int(kept.count_nonzero()) / max(1, kept.numel())


def settle_folds(verdicts: Sequence[GroupVerdict]) -> list[GroupVerdict]:
    """Let nothing move into rows of this layer that are not sparse.

    A permutation can where every linear that feeds the group is stored sparse, and where blocks
    that one value head feeds agree.
    """
    sparse = {linear for verdict in verdicts if verdict.holds for linear in verdict.density}

    def settled(verdict: GroupVerdict) -> GroupVerdict:
        permutation, group = verdict.permutation, verdict.layout.group
        if sparse.issuperset(part.linear for part in group.fold_into) and (
            permutation is None or agrees(verdict.layout, permutation)
        ):
            return verdict
        return replace(verdict, layout=verdict.layout.at_run_time())

    return [settled(verdict) for verdict in verdicts]
