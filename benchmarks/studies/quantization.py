"""Permutations for group-wise int4, alone and on top of 2:4.

A permutation decides which channels share a scale. The permutations of a checkpoint stay inside
blocks of 64 channels, so they change the groups of 32 and none of the larger ones; orders of a
whole layer are here to see what they would bring, no kernel applies them for free. Int8 values
have one scale for a whole row, which no order of the columns changes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.records.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.int4_learning import learn_with_int4
from benchmarks.studies.rounding import by_range, rounded
from benchmarks.studies.study import Study
from benchmarks.studies.subject import MANY_CELLS, SharedStatistics, Subject
from permllm_offline.calibration.calibrated_model import Permutations
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.preparation.prepared import prepare
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.pruning.output_errors import WINDOWS, layer_outputs, output_errors
from permllm_offline.sparsity.importance import wanda
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute

PATTERN = Pattern(2, 4)
GROUPS = (32, 128)
LEARNED_GROUP = 64
"""Channels of a group while weights that were rounded before learning are learned on: a block, so
that what a group holds does not depend on the permutation that is learned."""

Weights = Mapping[str, Tensor]
"""Linear -> [out_features, in_features], of one shared-input group."""

Order = Callable[[int, GroupLayout, Weights], Tensor]
"""Gives the order of a group of a decoder layer: int64 [in_features], position -> channel."""


class Rounding:
    """A subject under permutations, masks and int4 grids."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.plan = subject.prepared(subject.recipe("wanda+cp")).plan

    def measured(self, order: Order, group: int | None, *, sparse: bool) -> dict[str, Any]:
        """Perplexity, and the error of each decoder layer's output, errors before included."""
        model, subject = self.subject.load(), self.subject
        windows = subject.windows[:WINDOWS]
        dense = list(layer_outputs(model, subject.family, windows))
        for index, layer in enumerate(decoder_layers(model, subject.family.layers)):
            for layout in self.plan.layers[index]:
                linears = {name: linear_of(layer, name) for name in layout.group.linears}
                weights = {name: linear.weight.data for name, linear in linears.items()}
                chosen = order(index, layout, weights)
                for name, linear in linears.items():
                    weight = weights[name]
                    if sparse:
                        weight = weight * self._mask(index, layout, weight, chosen)
                    if group is not None:
                        weight = rounded(weight, chosen, group)
                    linear.weight.data = weight
        errors = output_errors(model, subject.family, windows, dense)
        found = {"output_error": sum(errors) / len(errors), "output_errors": errors}
        return found | {"perplexity": subject.perplexity(model)}

    def _mask(self, index: int, layout: GroupLayout, weight: Tensor, order: Tensor) -> Tensor:
        score = self._score(index, layout, weight)[:, order]
        return choose_mask(score, PATTERN, None, layout.block_size)[:, order.argsort()]

    def _score(self, index: int, layout: GroupLayout, weight: Tensor) -> Tensor:
        return wanda(weight, self.subject.statistics.norms[index][layout.group.name])[:]

    def plain(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """Channels where they are."""
        return torch.arange(layout.in_features)

    def reallocated(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """The heuristic reallocation, inside blocks."""
        scores = {name: self._score(index, layout, weight) for name, weight in weights.items()}
        local = layout.expand(allocate_group(layout, scores, PATTERN))
        return absolute(local, layout.block_size)

    def learned(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """Learned for 2:4 on the weights as they are."""
        return self._learned[index][layout.group.name]

    def learned_under_int4(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """Learned for 2:4 on weights that were rounded before, whatever their order."""
        return self._learned_under_int4[index][layout.group.name]

    def learned_for_int4(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """Learned for int4 values in groups of 32 that the permutation forms."""
        return self._learned_for_int4[index][layout.group.name]

    def learned_for_both(self, index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        """Learned for 2:4 and for int4 values in groups of 32 that the permutation forms."""
        return self._learned_for_both[index][layout.group.name]

    @cached_property
    def _learned(self) -> Sequence[Mapping[str, Tensor]]:
        return self._permutations(self.subject.directory)

    @cached_property
    def _learned_for_int4(self) -> Sequence[Mapping[str, Tensor]]:
        return self._absolute(learn_with_int4(self.subject, GROUPS[0], sparse=False))

    @cached_property
    def _learned_for_both(self) -> Sequence[Mapping[str, Tensor]]:
        return self._absolute(learn_with_int4(self.subject, GROUPS[0], sparse=True))

    @cached_property
    def _learned_under_int4(self) -> Sequence[Mapping[str, Tensor]]:
        model = self.subject.load()
        for index, layer in enumerate(decoder_layers(model, self.subject.family.layers)):
            for layout in self.plan.layers[index]:
                for name in layout.group.linears:
                    weight = linear_of(layer, name).weight
                    order = torch.arange(layout.in_features)
                    weight.data = rounded(weight.data, order, LEARNED_GROUP)
        with tempfile.TemporaryDirectory(prefix="permllm-study-") as directory:
            model.save_pretrained(directory)
            load_tokenizer(self.subject.source).save_pretrained(directory)
            return self._permutations(Path(directory))

    def _permutations(self, directory: Path) -> Sequence[Mapping[str, Tensor]]:
        recipe = self.subject.recipe("permllm-wanda", model=str(directory))
        work = SharedStatistics(self.subject.statistics)
        found: list[dict[str, Tensor]] = []
        for layer in prune_model(recipe, prepare(recipe), work).decisions:
            found.append({})
            for group in layer:
                assert group.permutation is not None
                found[-1][group.layout.group.name] = group.permutation
        return self._absolute(found)

    def _absolute(self, permutations: Permutations) -> Sequence[Mapping[str, Tensor]]:
        """Orders of whole layers from block-local permutations."""
        size = self.subject.recipe("wanda+cp").block_size
        return [{name: absolute(p, size) for name, p in layer.items()} for layer in permutations]


def sorted_by_range(order: Order, unit: int, *, across_blocks: bool) -> Order:
    """The order of another, its runs of ``unit`` channels sorted by their range.

    The range of a channel is the root mean square of its weights. Tied blocks are sorted alike,
    unless ``across_blocks`` sorts the whole layer, which no checkpoint holds.
    """

    def found(index: int, layout: GroupLayout, weights: Weights) -> Tensor:
        first = order(index, layout, weights)
        square = torch.cat(list(weights.values())).float().square().mean(0)
        if across_blocks:
            return first[by_range(square[first], unit, layout.in_features)]
        ties, size = layout.ties(), layout.block_size
        tied = torch.zeros((int(ties.max()) + 1, size)).index_add_(
            0, ties, square.reshape(-1, size)
        )
        return first[by_range(tied[ties].flatten()[first], unit, size)]

    return found


def orders(rounding: Rounding) -> Mapping[str, Mapping[str, Order]]:
    """Of int4 alone and of 2:4 with int4: name -> order."""
    plain, reallocated, learned = rounding.plain, rounding.reallocated, rounding.learned
    return {
        "int4": {
            "none": plain,
            "sorted by range, in blocks": sorted_by_range(plain, 1, across_blocks=False),
            "sorted by range, whole layer": sorted_by_range(plain, 1, across_blocks=True),
            "CP": reallocated,
            "learned for int4": rounding.learned_for_int4,
        },
        "2:4 + int4": {
            "none": plain,
            "CP": reallocated,
            "CP, fours sorted, in blocks": sorted_by_range(reallocated, 4, across_blocks=False),
            "CP, fours sorted, whole layer": sorted_by_range(reallocated, 4, across_blocks=True),
            "learned": learned,
            "learned, fours sorted, in blocks": sorted_by_range(learned, 4, across_blocks=False),
            "learned under int4": rounding.learned_under_int4,
            "learned for both": rounding.learned_for_both,
        },
    }


def changes_groups(name: str, group: int, block_size: int) -> bool:
    """Whether an order of this name can change which channels form a group."""
    return "whole layer" in name or group % block_size != 0


def measure(subject: Subject, cells: Cells) -> None:
    """Int4 alone, 2:4 alone and both, under each order that can matter."""
    rounding = Rounding(subject)
    block_size = subject.recipe("wanda+cp").block_size
    values = orders(rounding)
    cells.row({"values": "dense"}, subject.dense)
    for group in GROUPS:
        for name, order in values["int4"].items():
            if name == "none" or changes_groups(name, group, block_size):
                key = {"values": "int4", "group": group, "permutation": name}
                cells.row(key, partial(rounding.measured, order, group, sparse=False))
    for name, order in values["2:4 + int4"].items():
        if "sorted" not in name:  # within a four, and between fours, the order is nothing to 2:4
            key = {"values": "2:4", "permutation": name}
            cells.row(key, partial(rounding.measured, order, None, sparse=True))
        for group in GROUPS:
            if "sorted" not in name or changes_groups(name, group, block_size):
                key = {"values": "2:4 + int4", "group": group, "permutation": name}
                cells.row(key, partial(rounding.measured, order, group, sparse=True))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of 2:4 with int4, and of int4 alone, by order."""
    kept = [row for row in rows if row.get("permutation")]
    labels = [
        f"{row['values']}: {row['permutation']}" + (f"; {row['group']}" if "group" in row else "")
        for row in kept
    ]
    perplexity_bars(axes, kept, labels)


STUDY = Study(
    "permutations for group-wise int4, alone and with 2:4",
    ("values", "group", "permutation"),
    measure,
    draw,
    MANY_CELLS,
)
