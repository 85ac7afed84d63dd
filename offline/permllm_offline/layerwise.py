"""Prune the decoder layers in order, each fed by the pruned ones before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.bake import apply_masks
from permllm_offline.calibrated import Calibrated
from permllm_offline.decisions import LayerDecision
from permllm_offline.decoder_calls import record_calls, run_windows
from permllm_offline.modules import decoder_layers, linear_of
from permllm_offline.reconstruction.layer_work import LayerReconstruction, LayerWork
from permllm_offline.steps import Step

logger = logging.getLogger(__name__)

_MASK = "mask:"

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
        step = calibrated.work.step(f"layer-{index:04d}", partial(_finish, work, reconstruct))
        layer.load_state_dict({name: step.tensors[name] for name in layer.state_dict()})
        final.append(_decision(decisions[index], step))
        sparse = run_windows(layer, sparse, keywords)
        after = relative_error(sparse, dense)
        errors.append(LayerError(family.layer_name(index), step.facts["before"], after))
        logger.info("%s: relative error %.4f -> %.4f", *astuple(errors[-1]))
    return final, errors


def _finish(work: LayerWork, reconstruct: LayerReconstruction) -> Step:
    """Reconstruct and prune one layer: its weights and masks."""
    before = _masked_error(work)
    decision = reconstruct(work)
    apply_masks(work.layer, decision)
    masks = {_MASK + name: mask for group in decision for name, mask in group.masks.items()}
    retained = {name: share for group in decision for name, share in group.retained.items()}
    return Step({**work.layer.state_dict(), **masks}, {"before": before, "retained": retained})


def _decision(before: LayerDecision, step: Step) -> LayerDecision:
    """The decision with the masks of a finished step."""
    return [
        replace(
            group,
            masks={name: step.tensors[_MASK + name] for name in group.masks},
            retained={name: step.facts["retained"][name] for name in group.masks},
        )
        for group in before
    ]


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
