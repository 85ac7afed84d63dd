"""Permutations of one decoder layer for the most score, or for the least loss.

The heuristics keep as much importance as they can; the loss is what the layer's output loses. The
same search by swaps, from the same start, is run for both, and both are measured for each: on the
calibration windows, and on windows that it did not see. Blocks of `o` are tied and keep the
reallocation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records.drawing import bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import MANY_CELLS, Subject
from benchmarks.studies.swapping import Block
from permllm_offline.calibration.statistics import last_hidden_state
from permllm_offline.model.family import Fold
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.permutation.linear_assignment import assign_group
from permllm_offline.sparsity.importance import wanda
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN = Pattern(2, 4)
SEARCHES = ("most score", "least loss", "most squared score")
KINDS = ("none", "CP", "CP with linear sum assignment", *SEARCHES)


@torch.inference_mode()
def input_moments(subject: Subject, model: Any, index: int, windows: Tensor) -> dict[str, Tensor]:
    """Sum of x x^T over tokens, for what each shared-input group of a decoder layer reads."""
    layer = decoder_layers(model, subject.family.layers)[index]
    moments: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(module: nn.Module, inputs: Sequence[Tensor]) -> None:
            tokens = inputs[0].flatten(0, -2).float()
            moments[name] = moments.get(name, 0) + tokens.t() @ tokens

        return hook

    handles = [
        linear_of(layer, group.linears[0]).register_forward_pre_hook(add(group.name))
        for group in subject.family.groups
    ]
    try:
        for window in windows:
            last_hidden_state(model, subject.family, window[None])
    finally:
        for handle in handles:
            handle.remove()
    return moments


class PrunedLayer:
    """One decoder layer of a dense model, and what flows into it."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.index = subject, subject.layers // 2
        model = subject.load()
        self.layouts = subject.prepared(subject.recipe("wanda+cp")).plan.layers[self.index]
        self.seen = input_moments(subject, model, self.index, subject.windows)
        unseen = subject.unseen["in domain"]
        self.unseen = input_moments(subject, model, self.index, unseen)
        self.tokens = subject.windows.numel()

    def measured(self, kind: str) -> dict[str, Any]:
        """Both objectives, and the perplexity with this layer alone pruned."""
        model = self.subject.load()
        layer = decoder_layers(model, self.subject.family.layers)[self.index]
        kept_score = score = 0.0
        lost: dict[str, float] = {}
        for layout in self.layouts:
            name = layout.group.name
            linears = [linear_of(layer, linear) for linear in layout.group.linears]
            norm = (self.seen[name].diagonal() / self.tokens).sqrt()
            scores = {
                linear: wanda(linear_of(layer, linear).weight.data, norm)[:]
                for linear in layout.group.linears
            }
            order = self._order(kind, layout, linears, scores)
            for linear, importance in zip(linears, scores.values(), strict=True):
                mask = choose_mask(importance[:, order], PATTERN, None, layout.block_size)
                mask = mask[:, order.argsort()]
                kept_score += float((importance * mask).sum())
                score += float(importance.sum())
                for text, moments in (("calibration", self.seen), ("unseen", self.unseen)):
                    error = relative_error(linear.weight.data, mask, moments[name])
                    lost[text] = lost.get(text, 0.0) + error
                linear.weight.data.mul_(mask)
        linears_in_all = sum(len(layout.group.linears) for layout in self.layouts)
        return {
            "score_kept": kept_score / score,
            "loss_calibration": lost["calibration"] / linears_in_all,
            "loss_unseen": lost["unseen"] / linears_in_all,
            "perplexity": self.subject.perplexity(model),
        }

    def _order(
        self,
        kind: str,
        layout: GroupLayout,
        linears: Sequence[nn.Linear],
        scores: Mapping[str, Tensor],
    ) -> Tensor:
        """int64 [in_features], position -> channel."""
        starts = (torch.arange(layout.num_blocks) * layout.block_size)[:, None]
        if kind == "none":
            return torch.arange(layout.in_features)
        if kind == "CP with linear sum assignment":
            return (assign_group(layout, scores, PATTERN)[layout.ties()] + starts).flatten()
        local = allocate_group(layout, scores, PATTERN)[layout.ties()]
        if kind not in SEARCHES or layout.group.fold is Fold.VALUE_HEADS:
            return (local + starts).flatten()
        weight = torch.cat([linear.weight.data.float() for linear in linears])
        importance = torch.cat(list(scores.values()))
        if kind == "most squared score":
            importance = importance.square()
        moment, size, found = self.seen[layout.group.name], layout.block_size, []
        for number, order in enumerate(local):
            inside = slice(number * size, (number + 1) * size)
            block = Block(
                weight[:, inside], importance[:, inside], moment[inside, inside], order, PATTERN
            )
            gain = block.loss_gain if kind == "least loss" else block.score_gain
            found.append(block.improve(gain))
        return (torch.stack(found) + starts).flatten()


def relative_error(weight: Tensor, mask: Tensor, moment: Tensor) -> float:
    """Squared error of a masked linear's output over the square of its output."""
    weight = weight.float()
    pruned = weight * ~mask
    return float(((pruned @ moment) * pruned).sum() / ((weight @ moment) * weight).sum())


def measure(subject: Subject, cells: Cells) -> None:
    """Each kind of permutation of the layer in the middle."""
    cells.row({"permutation": "dense"}, subject.dense)
    layer: list[PrunedLayer] = []

    def one(kind: str) -> dict[str, Any]:
        if not layer:
            layer.append(PrunedLayer(subject))
        return layer[0].measured(kind)

    for kind in KINDS:
        cells.row({"permutation": kind}, partial(one, kind))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Both objectives of each kind."""
    pruned = [row for row in rows if row["permutation"] != "dense"]
    series = {
        "score lost": [1 - row["score_kept"] for row in pruned],
        "output error, calibration windows": [row["loss_calibration"] for row in pruned],
        "output error, unseen windows": [row["loss_unseen"] for row in pruned],
    }
    bars(axes, [row["permutation"] for row in pruned], series)
    axes.set_xlabel("share")


STUDY = Study(
    "permutations for the most score or the least loss", ("permutation",), measure, draw, MANY_CELLS
)
