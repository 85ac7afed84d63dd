"""What a prune will take, from its recipe, the sizes of the model and one timed product."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from permllm_offline.permutations import PERMUTATIONS
from permllm_offline.plan import PlannedLinear
from permllm_offline.preparation import Prepared
from permllm_offline.recipe import Recipe
from permllm_offline.reconstructions import RECONSTRUCTIONS
from permllm_offline.streamed_pruning import can_stream, reads_activations

PASSES_TO_EACH_GROUP = 1.8
"""Forward passes that reach the four groups of a decoder layer in turn, each stopped there."""

BACKWARD = 3
"""A forward and a backward pass, in forward passes."""

TIMED_SECONDS = 0.1


@dataclass(frozen=True)
class Forecast:
    """Estimates: seconds of each decoder layer, those of whole-model learning, peak bytes.

    They count the products of linear layers at the speed measured for one, so a busy machine, long
    sequences (attention grows with their square) and slow disks take longer.
    """

    layer_seconds: Sequence[float]
    learning_seconds: float
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole prune."""
        return sum(self.layer_seconds) + self.learning_seconds


def forecast(recipe: Recipe, prepared: Prepared, speed: float | None = None) -> Forecast:
    """Forecast a prune.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        speed: operations per second of a product; None measures it.
    """
    plan, windows = prepared.plan, prepared.windows
    reconstruction = RECONSTRUCTIONS[recipe.parsed_method().reconstruction]
    read = 0 if windows is None else windows.calibration.numel()
    held_out = 0 if windows is None else windows.held_out.numel()
    if not reads_activations(recipe):
        read = 0
    speed = speed or measured_speed(prepared, plan.linears[0])
    per_layer = len(plan.linears) // len(plan.layers)
    layers = [plan.linears[i : i + per_layer] for i in range(0, len(plan.linears), per_layer)]
    seconds = []
    for linears in layers:
        passes = float(read + 2 * held_out)
        operations = 0.0
        if reconstruction.layer is not None:
            passes += (1 + PASSES_TO_EACH_GROUP) * read
            operations = sum(_update_operations(linear, read) for linear in linears)
        operations += 2 * passes * sum(_weights(linear) for linear in linears)
        seconds.append(operations / speed)
    steps = 0
    if PERMUTATIONS[recipe.parsed_method().permutation].learn is not None:
        steps += recipe.learning.steps * recipe.learning.windows_per_step
    if reconstruction.model is not None:
        steps += recipe.distillation.steps * recipe.distillation.windows_per_step
    tokens = steps * recipe.sequence_length * BACKWARD
    learning = 2 * tokens * sum(map(_weights, plan.linears)) / speed
    return Forecast(seconds, learning, _peak_bytes(recipe, prepared, layers, read + held_out))


def measured_speed(prepared: Prepared, linear: PlannedLinear) -> float:
    """Operations per second of one linear layer over one window, timed for a moment."""
    tokens = 512 if prepared.windows is None else prepared.windows.calibration.shape[1]
    dtype, device, channels = prepared.dtype, prepared.device, linear.layout.in_features
    inputs = torch.zeros((tokens, channels), dtype=dtype, device=device)
    weight = torch.zeros((linear.out_features, channels), dtype=dtype, device=device)
    torch.nn.functional.linear(inputs, weight)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < TIMED_SECONDS:
        float(torch.nn.functional.linear(inputs, weight)[0, 0])  # waits for the device
        count += 1
    return 2 * tokens * _weights(linear) * count / passed


def _weights(linear: PlannedLinear) -> int:
    return linear.out_features * linear.layout.in_features


def _update_operations(linear: PlannedLinear, tokens: int) -> float:
    """Second moment, its inverse, and the columns' updates of every row."""
    channels = linear.layout.in_features
    moment = 0.0
    if linear.name.endswith(linear.layout.group.linears[0]):
        moment = 2.0 * tokens * channels**2 + 3.0 * channels**3
    return moment + linear.out_features * channels**2


def _peak_bytes(
    recipe: Recipe, prepared: Prepared, layers: Sequence[Sequence[PlannedLinear]], tokens: int
) -> int:
    """Weights and states that are in memory together."""
    plan, item = prepared.plan, prepared.dtype.itemsize
    pruned_bytes = sum(linear.dense_bytes for linear in plan.linears)
    rest = plan.total_bytes - sum(linear.sparse_bytes for linear in plan.linears)
    layer_bytes = max(sum(linear.dense_bytes for linear in linears) for linears in layers)
    widest = max(linear.layout.in_features for linear in plan.linears)
    scores = 4 * max(map(_weights, plan.linears)) * 4  # float32 importance, ranks and masks
    states = 3 * tokens * plan.layers[0][0].in_features * item  # dense, pruned, and the next
    if not can_stream(recipe):
        return rest + pruned_bytes + scores + states
    moment = 0
    if RECONSTRUCTIONS[recipe.parsed_method().reconstruction].layer is not None:
        moment = widest**2 * (4 + 3 * 8)
    return rest + 2 * layer_bytes + scores + states + moment
