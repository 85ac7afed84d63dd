"""Prune the decoder layers in order, each fed by the pruned ones before it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import Calibrated
from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import decoder_layers, linear_of, load_tensor
from permllm_offline.reconstruction.layer_work import LayerError, LayerReconstruction, LayerWork
from permllm_offline.run.steps import Step
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision
from permllm_offline.sparsity.importance import row_chunks
from permllm_vllm.checkpoint.packing import unpack_mask

logger = logging.getLogger(__name__)

_MASK, _PERMUTATION = "mask:", "permutation:"

PASSES = "passes"
"""Name of the cost of running windows through the decoder layers, one by one, dense and pruned."""

MEASURED_WINDOWS = 8
"""Windows on which the error before reconstruction is measured: it only informs."""


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
        call = calls.layers[index]
        with calibrated.work.measured(PASSES):
            dense = run_windows(layer, dense, call)
        recipe = calibrated.recipe
        work = LayerWork(index, layer, call, decisions[index], sparse, dense.hidden, recipe)
        step = calibrated.work.step(
            layer_step_name(index), partial(finish_layer, work, reconstruct)
        )
        load_step(layer, step)
        final.append(decision_of(calibrated.plan.layers[index], step))
        with calibrated.work.measured(PASSES):
            sparse = run_windows(layer, sparse, call)
        after = relative_error(sparse.hidden, dense.hidden)
        error = layer_error(family.layer_name(index), step, after)
        errors.append(error)
        logger.info("%s: relative error %.4f -> %.4f", error.name, error.before, error.after)
    return final, errors


def layer_step_name(index: int) -> str:
    """Name under which the pruned weights of a decoder layer are kept."""
    return f"layer-{index:04d}"


def finish_layer(work: LayerWork, reconstruct: LayerReconstruction) -> Step:
    """Reconstruct and prune one decoder layer in place, as a step that can be kept."""
    before = _masked_error(work)
    # With nothing pruned of it, it has no kept weights to move either.
    decision = reconstruct(work) if work.decision else work.decision
    apply_masks(work.layer, decision)
    step = pruned_layer(work.layer, decision)
    return Step(step.tensors, {**step.facts, "before": before, "curve": work.curve})


def layer_error(name: str, step: Step, after: float) -> LayerError:
    """The error of a decoder layer that ``finish_layer`` finished."""
    return LayerError(name, step.facts["before"], after, step.facts["curve"])


def pruned_layer(layer: nn.Module, decision: LayerDecision) -> Step:
    """Weights of a pruned decoder layer, and its decision."""
    tensors = dict(layer.state_dict())
    retained: dict[str, float] = {}
    for group in decision:
        tensors |= {_MASK + name: mask for name, mask in group.masks.items()}
        retained |= group.retained
        if group.permutation is not None:
            tensors[_PERMUTATION + group.layout.group.name] = group.permutation
    return Step(tensors, {"retained": retained})


def load_step(layer: nn.Module, step: Step) -> None:
    """Give a decoder layer the weights of a finished step."""
    for name in layer.state_dict():  # one by one: read all at once, they are a second layer
        load_tensor(layer, name, step.tensors[name])


def decision_of(layouts: Sequence[GroupLayout], step: Step) -> LayerDecision:
    """The decision of a finished step."""
    return [
        GroupDecision(
            layout,
            step.tensors.get(_PERMUTATION + layout.group.name),
            {name: step.tensors[_MASK + name] for name in layout.group.linears},
            {name: step.facts["retained"][name] for name in layout.group.linears},
        )
        for layout in layouts
    ]


def _masked_error(work: LayerWork) -> float:
    """Error with the masks alone, on a few windows; the weights are as before."""
    with _masked(work.layer, work.decision):
        output = run_windows(work.layer, work.inputs[:MEASURED_WINDOWS], work.call)
    return relative_error(output.hidden, work.targets[:MEASURED_WINDOWS])


@contextmanager
def _masked(layer: nn.Module, decision: LayerDecision) -> Iterator[None]:
    """Zero the pruned weights of a decoder layer in the context; they are kept aside, no others."""
    parts = [
        (linear_of(layer, name).weight.data[rows], mask[rows])
        for group in decision
        for name, mask in group.masks.items()
        for rows in row_chunks(linear_of(layer, name).weight.shape)
    ]
    pruned = [weight[~unpack_mask(mask).to(weight.device)] for weight, mask in parts]
    try:
        apply_masks(layer, decision)
        yield
    finally:
        for (weight, mask), values in zip(parts, pruned, strict=True):
            weight.masked_scatter_(~unpack_mask(mask).to(weight.device), values)


def relative_error(output: Tensor, target: Tensor) -> float:
    """Sum of squared differences over sum of squares, window by window in float32."""
    difference = total = 0.0
    for mine, other in zip(output, target, strict=True):
        difference += float((mine.float() - other.float()).square().sum())
        total += float(other.float().square().sum())
    return difference / max(total, torch.finfo(torch.float32).tiny)
