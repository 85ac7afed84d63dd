"""A span of decoder layers under permutations that are learned, measured against the dense one."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from permllm_offline.calibration.calibrated_model import Calibrated, Permutations
from permllm_offline.model.decoder_calls import LayerCall, run_layer, run_windows
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.model.states import States
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation
from permllm_offline.sparsity.importance import Scores
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute

StandIn = Callable[[nn.Linear, Scores, Pattern, StepPermutation], nn.Module]
"""Makes what takes the place of a linear: from it, its scores, N and M, and the permutation."""


@dataclass
class _Slot:
    """One shared-input group and its rows ``start:stop`` in the tensor of all permutations."""

    layout: GroupLayout
    start: int
    stop: int
    permutation: StepPermutation


class LearnedSpan:
    """Consecutive decoder layers whose linears are masked, some under one tensor of permutations.

    ``initial`` is int64 [independent permutations, block_size], position -> channel: the
    heuristic reallocation of every group that learns, where learning starts. The other groups
    keep the reallocation. Use it through ``learned_span``, which puts the original linears back.

    Args:
        calibrated: the dense model and its scores.
        span: numbers of the decoder layers.
        learned: numbers of those that learn.
        calls: of each decoder layer's call, the whole model's.
        stand_in: takes the place of each linear whose permutation is learned.
    """

    def __init__(
        self,
        calibrated: Calibrated,
        span: range,
        learned: Container[int],
        calls: Sequence[LayerCall],
        stand_in: StandIn = PermutedMaskedLinear,
    ) -> None:
        self._stand_in = stand_in
        layers = decoder_layers(calibrated.model, calibrated.plan.family.layers)
        self.layers = [layers[index] for index in span]
        self.device = next(self.layers[0].parameters()).device
        self._calls = [calls[index] for index in span]
        self._block_size = calibrated.recipe.block_size
        self._pattern = calibrated.recipe.parsed_pattern()
        self._originals: list[tuple[nn.Module, str, nn.Linear]] = []
        self._slots: list[dict[str, _Slot]] = []
        self._fixed: list[dict[str, Tensor]] = []
        initial, start = [torch.empty((0, self._block_size), dtype=torch.int64)], 0
        for index, layer in zip(span, self.layers, strict=True):
            self._slots.append({})
            self._fixed.append({})
            for layout in calibrated.plan.layers[index]:
                importances = calibrated.score(index, layout)
                order = allocate_group(layout, importances, self._pattern)
                if index in learned:
                    slot = self._learn(layer, layout, importances, start, start + len(order))
                    self._slots[-1][layout.group.name] = slot
                    initial.append(order)
                    start = slot.stop
                else:
                    permutation = layout.expand(order)
                    self._fixed[-1][layout.group.name] = permutation
                    self._fix(layer, layout, importances, permutation)
        self.initial = torch.cat(initial)

    def _learn(
        self,
        layer: nn.Module,
        layout: GroupLayout,
        importances: Mapping[str, Scores],
        start: int,
        stop: int,
    ) -> _Slot:
        permutation = StepPermutation(torch.empty(0), layout.ties().to(self.device))
        for name, importance in importances.items():
            linear = self._original(layer, name)
            masked = self._stand_in(linear, importance, self._pattern, permutation)
            layer.set_submodule(name, masked)
        return _Slot(layout, start, stop, permutation)

    def _fix(
        self,
        layer: nn.Module,
        layout: GroupLayout,
        importances: Mapping[str, Scores],
        permutation: Tensor,
    ) -> None:
        for name, importance in importances.items():
            linear = self._original(layer, name)
            mask = choose_mask(importance[:], self._pattern, permutation, layout.block_size)
            masked = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
            masked.weight = nn.Parameter(linear.weight.data * mask, requires_grad=False)
            masked.bias = linear.bias
            layer.set_submodule(name, masked)

    def _original(self, layer: nn.Module, name: str) -> nn.Linear:
        linear = linear_of(layer, name)
        self._originals.append((layer, name, linear))
        return linear

    def restore(self) -> None:
        """Put the original linears back, their weights as they lay in memory before."""
        for layer, name, linear in self._originals:
            linear.weight.data = linear.weight.data.contiguous()
            layer.set_submodule(name, linear)

    def use(self, order: Tensor, soft: Tensor | None = None) -> None:
        """Set the permutations of the next forward passes.

        Args:
            order: int64 [independent permutations, block_size], position -> channel.
            soft: [independent permutations, block_size, block_size] that ``order`` hardens, where
                ``gradient`` is wanted.
        """
        for slot in self._all_slots():
            local = slot.layout.expand(order[slot.start : slot.stop])
            slot.permutation.order = absolute(local, self._block_size).to(self.device)
            # A leaf for each group: the gradient of a slice of one leaf is as big as the leaf.
            slot.permutation.soft = None
            if soft is not None:
                leaf = soft[slot.start : slot.stop].detach().clone()
                slot.permutation.soft = leaf.requires_grad_()

    def gradient(self) -> Tensor:
        """Gradient of the loss in ``soft``, summed over the backward passes since ``use``.

        Zeros for the experts that no token of these passes reached.
        """
        leaves = [slot.permutation.soft for slot in self._all_slots()]
        return torch.cat(
            [
                torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                for leaf in leaves
                if leaf is not None
            ]
        )

    def loss(self, states: States, targets: Tensor) -> Tensor:
        """Mean cosine distance to what the dense model gives after the span (Eq. 10).

        Args:
            states: of a batch, what enters the span.
            targets: [batch, sequence_length, hidden].
        """
        states = states.to(self.device)
        for layer, call in zip(self.layers, self._calls, strict=True):
            states = run_layer(layer, states, call)
        return cosine_distance(states.hidden, targets)

    def run(self, order: Tensor, states: States) -> States:
        """Pass all windows through the span, on the CPU."""
        self.use(order)
        for layer, call in zip(self.layers, self._calls, strict=True):
            states = run_windows(layer, states, call)
        return states

    def permutations(self, order: Tensor) -> Permutations:
        """The block-local permutations of every group, those that learn from ``order``."""
        return [
            fixed
            | {
                name: slot.layout.expand(order[slot.start : slot.stop])
                for name, slot in slots.items()
            }
            for slots, fixed in zip(self._slots, self._fixed, strict=True)
        ]

    def _all_slots(self) -> Iterator[_Slot]:
        for slots in self._slots:
            yield from slots.values()


def cosine_distance(states: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of one minus the cosine similarity, in float32.

    Args:
        states: [batch, sequence_length, hidden].
        targets: the same shape, on any device.
    """
    targets = targets.to(states.device).float()
    return 1 - functional.cosine_similarity(states.float(), targets, dim=-1).mean()


@contextmanager
def learned_span(
    calibrated: Calibrated,
    span: range,
    learned: Container[int],
    calls: Sequence[LayerCall],
    stand_in: StandIn = PermutedMaskedLinear,
) -> Iterator[LearnedSpan]:
    """Mask a span of decoder layers for the length of the context."""
    found = LearnedSpan(calibrated, span, learned, calls, stand_in)
    try:
        yield found
    finally:
        found.restore()


def fixed_permutations(
    calibrated: Calibrated,
    span: range,
    calls: Sequence[LayerCall],
    states: States | None,
) -> tuple[Permutations, States | None]:
    """Pass windows through decoder layers of which none learns, each masked while it is passed.

    Args:
        calibrated: the dense model and its scores.
        span: numbers of the decoder layers.
        calls: of each decoder layer's call, the whole model's.
        states: what enters the span; None passes nothing.

    Returns:
        The block-local permutations of every group, and what leaves the span.
    """
    found: list[Mapping[str, Tensor]] = []
    for index in span:
        with learned_span(calibrated, range(index, index + 1), (), calls) as fixed:
            found += fixed.permutations(fixed.initial)
            if states is not None:
                states = fixed.run(fixed.initial, states)
    return found, states
