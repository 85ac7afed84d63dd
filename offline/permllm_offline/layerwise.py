"""Prune the decoder layers in order, each fed by the pruned ones before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.bake import apply_masks
from permllm_offline.calibrated import Calibrated
from permllm_offline.decisions import LayerDecision
from permllm_offline.decoder_calls import record_calls, run_windows
from permllm_offline.modules import decoder_layers, linear_of
from permllm_offline.reconstruction.layer_work import LayerReconstruction, LayerWork

logger = logging.getLogger(__name__)

MEASURED_WINDOWS = 8
"""Windows on which the error before reconstruction is measured: it only informs."""


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of a decoder layer's output against the dense model's.

    ``before`` is that of the masks alone, ``after`` that of the reconstructed weights; both have
    the pruned layers before it as input, so they grow with depth.
    """

    name: str
    before: float
    after: float


def reconstruct_layers(
    calibrated: Calibrated, decisions: Sequence[LayerDecision], reconstruct: LayerReconstruction
) -> tuple[list[LayerDecision], list[LayerError]]:
    """Reconstruct every decoder layer of a dense model in place, and prune it.

    Args:
        calibrated: model, plan, recipe and windows; the model is pruned when this returns.
        decisions: of each decoder layer.
        reconstruct: called for each decoder layer, in order.

    Returns:
        The decisions with the masks that were applied, and the error of each layer.
    """
    model, family, windows = calibrated.model, calibrated.plan.family, calibrated.windows
    assert windows is not None
    calls = record_calls(model, family, windows)
    dense = sparse = calls.states
    final: list[LayerDecision] = []
    errors: list[LayerError] = []
    layers = decoder_layers(model, family.layers)
    for index, layer in enumerate(tqdm(layers, desc="reconstruction", unit="layer")):
        keywords = calls.keywords[index]
        dense = run_windows(layer, dense, keywords)
        work = LayerWork(index, layer, keywords, decisions[index], sparse, dense, calibrated.recipe)
        before = _masked_error(work)
        final.append(reconstruct(work))
        apply_masks(layer, final[-1])
        sparse = run_windows(layer, sparse, keywords)
        errors.append(LayerError(family.layer_name(index), before, relative_error(sparse, dense)))
        logger.info("%s: relative error %.4f -> %.4f", *astuple(errors[-1]))
    return final, errors


def _masked_error(work: LayerWork) -> float:
    """Error with the masks alone, on a few windows; the weights are as before."""
    linears = [linear_of(work.layer, name) for group in work.decision for name in group.masks]
    weights = [linear.weight.data for linear in linears]
    try:
        for linear in linears:
            linear.weight.data = linear.weight.data.clone()
        apply_masks(work.layer, work.decision)
        output = run_windows(work.layer, work.inputs[:MEASURED_WINDOWS], work.keywords)
    finally:
        _restore(linears, weights)
    return relative_error(output, work.targets[:MEASURED_WINDOWS])


def _restore(linears: Sequence[nn.Linear], weights: Sequence[Tensor]) -> None:
    for linear, weight in zip(linears, weights, strict=True):
        linear.weight.data = weight


def relative_error(output: Tensor, target: Tensor) -> float:
    """Sum of squared differences over sum of squares, window by window in float32."""
    difference = total = 0.0
    for mine, other in zip(output, target, strict=True):
        difference += float((mine.float() - other.float()).square().sum())
        total += float(other.float().square().sum())
    return difference / max(total, torch.finfo(torch.float32).tiny)
