"""Tune the kept weights of one decoder layer until it gives what the dense layer gave.

Tuning leaves masks and permutations as they are. The input is that of the pruned model, so that a
layer also makes up for what the layers before it got wrong; only this layer's weights, gradients
and Adam states are in memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.modules import linear_of
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.run.schedules import shuffled_batches, warmed_cosine
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.text.windows import require_windows


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Sum of squared differences, in float32 and differentiable in ``output``.

    A sum, not a mean: Adam does not care, and its gradient does not underflow in half precision.
    """
    return (output.float() - target.float()).square().sum()


def tune_kept_weights(work: LayerWork) -> LayerDecision:
    """Tune the kept weights of a decoder layer in place; its pruned weights become zero.

    ``work.curve`` gets the squared error of each step, of one window in the mean.
    The weights with the lowest error on calibration windows held out from tuning stay, those at the
    start included. A step takes windows that ``recipe.seed`` and the layer's number decide.

    Raises:
        OfflineError: too few calibration windows to hold some out, or an error that is not finite.
    """
    constants = work.recipe.blockwise
    held_out = constants.validation_windows
    require_windows(
        len(work.inputs), constants.windows_per_step, held_out, "tune a layer on", "weights"
    )
    apply_masks(work.layer, work.decision)
    masks = {name: mask for group in work.decision for name, mask in group.masks.items()}
    linears = [linear_of(work.layer, name) for name in masks]
    with KeptWeights(linears, list(masks.values())) as kept:
        _optimise(work, kept)
    return work.decision


def _optimise(work: LayerWork, kept: KeptWeights) -> None:
    constants = work.recipe.blockwise
    held_out = constants.validation_windows
    seed = work.recipe.seed + work.index
    batches = shuffled_batches(len(work.inputs) - held_out, constants.windows_per_step, seed)
    best_error = _validate(work, held_out)
    work.curve.append({"step": 0, "validation_loss": best_error})
    kept.remember()
    for step in range(1, constants.steps + 1):
        total = 0.0
        for index in (next(batches) + held_out).tolist():
            error = _window_error(work, index)
            error.backward()
            total += error.item()
        if not math.isfinite(total):
            raise OfflineError(
                f"the error of decoder layer {work.index} at tuning step {step} is {total}: the "
                "steps are too large, or the dtype too narrow. Lower the learning rate of the "
                "recipe's blockwise, or give --dtype bfloat16."
            )
        share = warmed_cosine(step, constants.steps, constants.warmup_share)
        kept.step(share * constants.learning_rate)
        work.curve.append({"step": step, "loss": total / constants.windows_per_step})
        if step % constants.validation_interval == 0 or step == constants.steps:
            value = work.curve[-1]["validation_loss"] = _validate(work, held_out)
            if value < best_error:
                best_error = value
                kept.remember()
    kept.recall()


def _window_error(work: LayerWork, index: int) -> Tensor:
    device = next(work.layer.parameters()).device
    output = work.forward(work.inputs[index : index + 1].to(device))
    return squared_error(output[0], work.targets[index].to(device))


@torch.no_grad()
def _validate(work: LayerWork, count: int) -> float:
    """Mean squared error of the first windows, which tuning never sees."""
    return sum(_window_error(work, index).item() for index in range(count)) / count
