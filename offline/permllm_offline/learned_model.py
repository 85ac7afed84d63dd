"""A model under permutations that are being learned, and its distance to the dense model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from permllm_offline.activations import last_hidden_state
from permllm_offline.calibrated import Calibrated, Permutations
from permllm_offline.channel_permutation import allocate_group
from permllm_offline.layout import GroupLayout
from permllm_offline.masked_linear import PermutedMaskedLinear, StepPermutation
from permllm_offline.modules import decoder_layers, linear_of
from permllm_vllm.checkpoint.permutation import absolute


@dataclass
class _Slot:
    """One shared-input group and its rows ``start:stop`` in the tensor of all permutations."""

    layout: GroupLayout
    start: int
    stop: int
    permutation: StepPermutation


class LearnedModel:
    """A model whose linears are masked under one tensor of permutations.

    ``initial`` is int64 [independent permutations, block_size], position -> channel: the
    heuristic reallocation of every group, where learning starts. Use it through
    ``learned_model``, which puts the original linears back.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        self.model = calibrated.model
        self.device = self.model.device
        self._family = calibrated.plan.family
        self._block_size = calibrated.recipe.block_size
        self._originals: list[tuple[nn.Module, str, nn.Linear]] = []
        self._slots: list[list[_Slot]] = []
        pattern, initial, start = calibrated.recipe.parsed_pattern(), [], 0
        for index, layer in enumerate(decoder_layers(self.model, self._family.layers)):
            self._slots.append([])
            for layout in calibrated.plan.layers[index]:
                importances = calibrated.score(index, layout)
                initial.append(allocate_group(layout, importances, pattern))
                permutation = StepPermutation(torch.empty(0), layout.ties().to(self.device))
                slot = _Slot(layout, start, start + len(initial[-1]), permutation)
                start = slot.stop
                self._slots[-1].append(slot)
                for name, importance in importances.items():
                    linear = linear_of(layer, name)
                    self._originals.append((layer, name, linear))
                    masked = PermutedMaskedLinear(linear, importance, pattern, permutation)
                    layer.set_submodule(name, masked)
        self.initial = torch.cat(initial)

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
        """Gradient of the loss in ``soft``, summed over the backward passes since ``use``."""
        gradients = [
            slot.permutation.soft.grad
            for slot in self._all_slots()
            if slot.permutation.soft is not None
        ]
        return torch.cat([gradient for gradient in gradients if gradient is not None])

    def loss(self, windows: Tensor, target: Tensor) -> Tensor:
        """Mean cosine distance to the dense model's last hidden state (Eq. 10).

        Args:
            windows: int64 [batch, sequence_length].
            target: [batch, sequence_length, hidden], of the dense model.
        """
        state = last_hidden_state(self.model, self._family, windows).float()
        target = target.to(state.device).float()
        return 1 - functional.cosine_similarity(state, target, dim=-1).mean()

    def permutations(self, order: Tensor) -> Permutations:
        """Return ``order`` as the block-local permutations of every group."""
        return [
            {
                slot.layout.group.name: slot.layout.expand(order[slot.start : slot.stop])
                for slot in slots
            }
            for slots in self._slots
        ]

    def _all_slots(self) -> Iterator[_Slot]:
        for slots in self._slots:
            yield from slots


@contextmanager
def learned_model(calibrated: Calibrated) -> Iterator[LearnedModel]:
    """Give the model learnable permutations for the length of the context."""
    learned = LearnedModel(calibrated)
    try:
        yield learned
    finally:
        learned.restore()
