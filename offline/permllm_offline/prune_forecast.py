"""What a prune will take, from its recipe, the sizes of the model and one timed product."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from permllm_offline.model.plan import PlannedLinear
from permllm_offline.permutation.kinds import PERMUTATIONS
from permllm_offline.permutation.learned_layers import largest_span, trained_share
from permllm_offline.preparation import Prepared
from permllm_offline.recipe import BlockwiseRecipe, DistillationRecipe, LearningRecipe, Recipe
from permllm_offline.recomputation import held_activation_bytes
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.run.processes import count
from permllm_offline.streamed_pruning import can_stream, reads_activations
from permllm_offline.text.calibration import SELF
from permllm_offline.text.sampled_text import PIECES_AT_ONCE
from permllm_vllm.checkpoint.writer import MAX_SHARD_BYTES

PASSES_TO_EACH_GROUP = 1.8
"""Forward passes that reach the four groups of a decoder layer in turn, each stopped there."""

BACKWARD = 3
"""A forward and a backward pass, in forward passes."""

DIVERGENCE = 3
"""Products with the head for a token of distillation: student's, teacher's, and the gradient."""

TUNED_BYTES = 4 + 8 + 4
"""For each weight that is tuned: a float32 copy, the states of Adam, and a float32 gradient."""

LEARNED_BYTES = 4 + 1
"""For each weight whose mask is learned: its importance, and the mask of the forward pass."""

TIMED_SECONDS = 0.1


@dataclass(frozen=True)
class Forecast:
    """Estimates: seconds of each decoder layer, those of each whole-model stage, peak bytes.

    They count the products of linear layers at the speed measured for one, so a busy machine, long
    sequences (attention grows with their square) and slow disks take longer.
    """

    layer_seconds: Sequence[float]
    stage_seconds: Mapping[str, float]
    peak_bytes: int

    @property
    def seconds(self) -> float:
        """Of the whole prune."""
        return sum(self.layer_seconds) + sum(self.stage_seconds.values())


def forecast(recipe: Recipe, prepared: Prepared, speed: float | None = None) -> Forecast:
    """Forecast a prune.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        speed: operations per second of a product; None measures it.
    """
    plan, windows = prepared.plan, prepared.windows
    reconstruction = RECONSTRUCTIONS[recipe.parsed_method().reconstruction]
    held_out = 0 if windows is None else windows.held_out.numel()
    read = updated = _read_tokens(recipe, prepared)
    if reconstruction.model is not None:  # a layer's reconstruction reads fewer
        updated = min(read, recipe.distillation.layer_windows * recipe.sequence_length)
    # A sampled token is one product of each matrix with a row for each piece.
    sampling_speed = speed or measured_speed(prepared, plan.linears[0], PIECES_AT_ONCE)
    speed = speed or measured_speed(prepared, plan.linears[0])
    parts = recipe.parsed_method().reconstruction.split("+")
    seconds = []
    for linears in plan.linears_by_layer():
        passes = float(read + 2 * held_out)
        operations = 0.0
        if reconstruction.layer is not None:
            passes += updated
        if "obs" in parts or "sparsegpt" in parts:
            passes += PASSES_TO_EACH_GROUP * updated
            operations += sum(_update_operations(linear, updated) for linear in linears)
        if "blockwise" in parts:
            steps, validation = _windows(recipe.blockwise)
            passes += (BACKWARD * steps + validation) * recipe.sequence_length
        operations += 2 * passes * sum(_weights(linear) for linear in linears)
        seconds.append(operations / speed)
    stages = _stage_seconds(recipe, prepared, speed, sampling_speed)
    return Forecast(seconds, stages, peak_bytes(recipe, prepared))


def _stage_seconds(
    recipe: Recipe, prepared: Prepared, speed: float, sampling_speed: float
) -> dict[str, float]:
    """Seconds of what runs the whole model: text that it writes, learning, distillation."""
    plan = prepared.plan
    model = sum(map(_weights, plan.linears))
    head = prepared.source.config.get_text_config().vocab_size * plan.layers[0][0].in_features
    stages: dict[str, float] = {}
    if PERMUTATIONS[recipe.parsed_method().permutation].learn is not None:
        steps, validation = _windows(recipe.learning)
        share = trained_share(recipe.learning, len(plan.layers))
        tokens = share * (BACKWARD * steps + validation) * recipe.sequence_length
        stages["learning"] = 2 * tokens * model / speed
    if RECONSTRUCTIONS[recipe.parsed_method().reconstruction].model is not None:
        tokens = recipe.distillation.self_windows * recipe.sequence_length
        stages["sampling text"] = 2 * tokens * (model + head) / sampling_speed
        steps, validation = _windows(recipe.distillation)
        products = (BACKWARD * steps + validation) * model + DIVERGENCE * (
            steps + validation
        ) * head
        stages["distillation"] = 2 * products * recipe.sequence_length / speed
    return stages


def _windows(constants: LearningRecipe | BlockwiseRecipe | DistillationRecipe) -> tuple[int, int]:
    """Windows that all steps of a training loop take, and those of all its validations."""
    validations = 1 + -(-constants.steps // constants.validation_interval)
    return constants.steps * constants.windows_per_step, validations * constants.validation_windows


def measured_speed(prepared: Prepared, linear: PlannedLinear, tokens: int | None = None) -> float:
    """Operations per second of one linear layer over one window, timed for a moment.

    ``tokens`` are those of the product in place of a window's.
    """
    if tokens is None:
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


def peak_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Weights, states of training, activations and hidden states that are in memory together.

    Or, where that is more, the model that writes text of its own, or one file of the output. A GPU
    has neither hidden states nor files in its memory. What several processes share out counts as
    the part of one.
    """
    plan, item = prepared.plan, prepared.dtype.itemsize
    pruned_bytes = sum(linear.dense_bytes for linear in plan.linears)
    rest = plan.total_bytes - sum(linear.sparse_bytes for linear in plan.linears)
    layer_bytes = max(
        sum(linear.dense_bytes for linear in linears) for linears in plan.linears_by_layer()
    )
    widest = max(linear.layout.in_features for linear in plan.linears)
    scores = 4 * max(map(_weights, plan.linears)) * 4  # float32 importance, ranks and masks
    states = 3 * _state_tokens(recipe, prepared) * plan.layers[0][0].in_features * item
    writing = min(MAX_SHARD_BYTES, plan.total_bytes)
    if prepared.device.type != "cpu":
        states = writing = 0
    parts = recipe.parsed_method().reconstruction.split("+")
    training, length = 0, recipe.sequence_length
    if PERMUTATIONS[recipe.parsed_method().permutation].learn is not None:
        share = largest_span(recipe.learning, len(plan.layers))
        sparse = LEARNED_BYTES * sum(map(_weights, plan.linears)) + pruned_bytes
        tokens = recipe.learning.windows_at_once * length
        training = round(share * sparse) + held_activation_bytes(plan, tokens, item, share)
    if "distillation" in parts:
        tuned = _tuned_bytes(pruned_bytes // item, item, count())
        training = max(training, tuned + held_activation_bytes(plan, length, item))
    elif "blockwise" in parts:
        training = max(training, _tuned_bytes(layer_bytes // item, item))
    if not can_stream(recipe):
        masks = sum(map(_weights, plan.linears)) // 8
        return rest + pruned_bytes + masks + max(scores + states + training, writing)
    moment = 0
    if "obs" in parts or "sparsegpt" in parts:
        moment = widest**2 * (4 + 3 * 8)
    pruning = 2 * layer_bytes + scores + states + max(moment, training)
    sampling = pruned_bytes if SELF in recipe.datasets else 0
    return rest + max(pruning, sampling, 2 * layer_bytes + writing)


def _tuned_bytes(weights: int, item: int, processes: int = 1) -> int:
    """For weights that are tuned: states, a snapshot and masks, shared out; and their gradients."""
    return weights * (TUNED_BYTES + item + 1) // processes + weights * item


def _state_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens whose hidden states are kept: dense, pruned, and the next layer's."""
    return _read_tokens(recipe, prepared) + (
        0 if prepared.windows is None else prepared.windows.held_out.numel()
    )


def _read_tokens(recipe: Recipe, prepared: Prepared) -> int:
    """Tokens that pass through the dense model, those that it writes itself included."""
    if prepared.windows is None or not reads_activations(recipe):
        return 0
    read = prepared.windows.calibration.numel()
    if RECONSTRUCTIONS[recipe.parsed_method().reconstruction].model is not None:
        read += recipe.distillation.self_windows * recipe.sequence_length
    return read
