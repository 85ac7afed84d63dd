"""What a prune will take, from its recipe, the sizes of the model and a layer timed here."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from permllm_offline.forecast.memory import (
    MemoryForecast,
    memory_forecast,
    read_tokens,
    updated_tokens,
)
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.model.prune_plan import PlannedLinear, pruned
from permllm_offline.permutation.learned_layers import (
    parse_layers,
    sensitivity_passes,
    trained_share,
)
from permllm_offline.permutation.learning import SENSITIVITY_WINDOWS
from permllm_offline.preparation.method_parts import MethodParts, parts_of
from permllm_offline.preparation.prepared import Prepared, own_text
from permllm_offline.recipe.schema import (
    BlockwiseRecipe,
    DistillationRecipe,
    LearningRecipe,
    Recipe,
)
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.text.sampled_text import PIECES_AT_ONCE
from permllm_offline.text.windows import own_shares

PASSES_TO_EACH_GROUP = 1.8
"""Forward passes that reach the four groups of a decoder layer in turn, each stopped there."""

DIVERGENCE = 3
"""Products with the head for a token of distillation: student's, teacher's, and the gradient."""

SENSITIVITY = "sensitivity"
"""The stage in which the layers that learn are chosen; what these take is a mean before."""

TIMED_SECONDS, TIMED_TOKENS = 0.1, 512
"""Of the product that is timed, at most: more tokens are not multiplied at another speed."""


class Speed(NamedTuple):
    """Operations of forward passes per second, as this machine has just shown them.

    ``forward`` counts those of a pass alone, ``training`` those of one that goes back again and
    then moves the kept weights.
    """

    forward: float
    training: float


@dataclass(frozen=True)
class Forecast:
    """Estimates: seconds of each decoder layer, those of each whole-model stage, and memory.

    Seconds count the products of linear layers at the speed measured for some, so a busy machine,
    long sequences (attention grows with their square) and slow disks take longer. The progress
    bars of the prune then tell what is left from what it has done.
    """

    layer_seconds: Sequence[float]
    stage_seconds: Mapping[str, float]
    memory: MemoryForecast

    @property
    def seconds(self) -> float:
        """Of the whole prune."""
        return sum(self.layer_seconds) + sum(self.stage_seconds.values())


def forecast(recipe: Recipe, prepared: Prepared, speed: Speed | None = None) -> Forecast:
    """Forecast a prune.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        speed: of this machine; None measures it.
    """
    plan, windows = prepared.plan, prepared.windows
    parts = parts_of(recipe)
    reconstruction = parts.reconstruction
    held_out = 0 if windows is None else windows.held_out.numel()
    read, updated = read_tokens(recipe, prepared), updated_tokens(recipe, prepared)
    # A sampled token is one product of each matrix with a row for each piece.
    sampling = measured_speed(prepared, plan.linears[0], PIECES_AT_ONCE) if not speed else 0.0
    speed = speed or _measured(prepared, parts)
    learned_in_windows = parts.permutation.learns and recipe.learning.scope == "window"
    seconds = []
    for linears in plan.all_by_layer:
        sparse = pruned(linears)
        passes, trained, operations = float(read + 2 * held_out), 0.0, 0.0
        if learned_in_windows:  # densely once more, and pruned
            passes += 2 * read
        if reconstruction.layer is not None:
            passes += updated
        if reconstruction.updates and sparse:
            passes += PASSES_TO_EACH_GROUP * updated
            operations += sum(_update_operations(linear, updated) for linear in sparse)
        if reconstruction.tunes and sparse:
            steps, validation = _windows(recipe.blockwise)
            passes += validation * recipe.sequence_length
            trained = float(steps * recipe.sequence_length)
        work = sum(linear.work for linear in linears)
        operations += 2 * passes * work
        seconds.append(operations / speed.forward + 2 * trained * work / speed.training)
    stages = _stage_seconds(recipe, prepared, speed, sampling or speed.forward)
    return Forecast(seconds, stages, memory_forecast(recipe, prepared))


def _stage_seconds(
    recipe: Recipe, prepared: Prepared, speed: Speed, sampling_speed: float
) -> dict[str, float]:
    """Seconds of what runs the whole model: text that it writes, learning, distillation."""
    plan = prepared.plan
    model = sum(linear.work for linear in plan.every_linear)
    head = prepared.source.config.get_text_config().vocab_size * plan.hidden_size
    stages: dict[str, float] = {}
    if sampled := _sampled_windows(recipe, prepared):
        products = sampled * recipe.sequence_length * (model + head)
        stages["sampling text"] = 2 * products / sampling_speed
    if parts_of(recipe).permutation.learns:
        if measured := _sensitivity_windows(recipe, prepared):
            passes = measured * sensitivity_passes(len(plan.layers)) / len(plan.layers)
            stages[SENSITIVITY] = 2 * passes * recipe.sequence_length * model / speed.forward
        steps, validation = _windows(recipe.learning)
        share = trained_share(recipe.learning, len(plan.layers), plan.pruned_layers)
        seconds = steps / speed.training + validation / speed.forward
        stages["learning"] = 2 * share * recipe.sequence_length * model * seconds
    if parts_of(recipe).reconstruction.distils:
        steps, validation = _windows(recipe.distillation)
        seconds = model * (steps / speed.training + validation / speed.forward)
        seconds += DIVERGENCE * (steps + validation) * head / speed.forward
        stages["distillation"] = 2 * recipe.sequence_length * seconds
    return stages


def _sampled_windows(recipe: Recipe, prepared: Prepared) -> int:
    """Windows that the dense model has yet to write: of a data set, and for a distillation."""
    own = own_text(recipe, prepared)
    shares = own_shares(recipe.datasets, recipe.num_samples, recipe.evaluation_windows)
    unwritten = sum(windows for windows in shares if not own.is_kept(windows))
    distils = parts_of(recipe).reconstruction.distils
    return unwritten + (recipe.distillation.self_windows if distils else 0)


def _sensitivity_windows(recipe: Recipe, prepared: Prepared) -> int:
    """Windows on which ``auto:N`` measures every decoder layer."""
    plan = prepared.plan
    choice = parse_layers(recipe.learning.layers, len(plan.layers), plan.pruned_layers)
    if choice.most_sensitive is None:
        return 0
    return min(SENSITIVITY_WINDOWS, read_tokens(recipe, prepared) // recipe.sequence_length)


def _windows(constants: LearningRecipe | BlockwiseRecipe | DistillationRecipe) -> tuple[int, int]:
    """Windows that all steps of a training loop take, and those of all its validations."""
    validations = 1 + -(-constants.steps // constants.validation_interval)
    return constants.steps * constants.windows_per_step, validations * constants.validation_windows


def _measured(prepared: Prepared, parts: MethodParts) -> Speed:
    """Time products, and where a method takes steps, those of one layer's linears too."""
    linears = prepared.plan.all_by_layer[prepared.plan.pruned_layers[0]]
    forward = measured_speed(prepared, prepared.plan.linears[0])
    reconstruction = parts.reconstruction
    if not (parts.permutation.learns or reconstruction.tunes or reconstruction.distils):
        return Speed(forward, forward)
    return Speed(forward, _training_speed(prepared, pruned(linears)))


@products_in_float32()
def _training_speed(prepared: Prepared, linears: Sequence[PlannedLinear]) -> float:
    """Operations of the forward passes of steps per second, through linears with random weights.

    Of equal ones, such as experts, one is timed.
    """
    tokens, dtype, device = _timed_tokens(prepared), prepared.dtype, prepared.device
    distinct = {(one.out_features, one.layout.in_features): one for one in linears}.values()
    modules, masks, inputs, operations = [], [], [], 0.0
    for one in distinct:
        channels, rows = one.layout.in_features, max(1, round(tokens * one.work / one.weights))
        module = nn.Linear(channels, one.out_features, bias=False, dtype=dtype, device=device)
        modules.append(module.requires_grad_(False))
        masks.append(torch.full((one.out_features, channels // 8), 0b00110011, dtype=torch.uint8))
        read = torch.zeros((rows, channels), dtype=dtype, device=device)
        inputs.append(read.requires_grad_())
        operations += 2 * rows * one.weights
    with KeptWeights(modules, masks) as kept:

        def step() -> None:
            for module, read in zip(modules, inputs, strict=True):
                module(read).sum().backward()
            kept.step(0.0)
            float(modules[-1].weight.data[0, 0])  # waits for the device

        return operations / _seconds_of(step)


def _seconds_of(work: Callable[[], object]) -> float:
    """Mean seconds of what is done over and over for a moment, after once that is not counted."""
    work()
    count, passed, start = 0, 0.0, time.perf_counter()
    while not count or passed < TIMED_SECONDS:
        work()
        count, passed = count + 1, time.perf_counter() - start
    return passed / count


def _timed_tokens(prepared: Prepared) -> int:
    """Of a window, as many as are timed."""
    windows = prepared.windows
    longest = TIMED_TOKENS if windows is None else windows.calibration.shape[1]
    return min(longest, TIMED_TOKENS)


def dtype_gain(prepared: Prepared, dtype: torch.dtype) -> float:
    """How many times as fast a linear layer is multiplied in another dtype than the model's."""
    linear = prepared.plan.linears[0]
    other = measured_speed(replace(prepared, dtype=dtype), linear)
    return other / measured_speed(prepared, linear)


@products_in_float32()
def measured_speed(prepared: Prepared, linear: PlannedLinear, tokens: int | None = None) -> float:
    """Operations per second of one linear layer over one window, timed for a moment.

    ``tokens`` are those of the product in place of a window's.
    """
    tokens = _timed_tokens(prepared) if tokens is None else tokens
    dtype, device, channels = prepared.dtype, prepared.device, linear.layout.in_features
    inputs = torch.zeros((tokens, channels), dtype=dtype, device=device)
    weight = torch.zeros((linear.out_features, channels), dtype=dtype, device=device)
    seconds = _seconds_of(  # each waits for the device
        lambda: float(nn.functional.linear(inputs, weight)[0, 0])
    )
    return 2 * tokens * linear.weights / seconds


def _update_operations(linear: PlannedLinear, tokens: int) -> float:
    """Second moment, its inverse, and the columns' updates of every row."""
    channels = linear.layout.in_features
    moment = 0.0
    if linear.leads_group:
        moment = 2.0 * tokens * linear.layout.group.share * channels**2 + 3.0 * channels**3
    return moment + linear.out_features * channels**2
