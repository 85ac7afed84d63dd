"""How far the output of each decoder layer of the pruned model is from the dense model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from permllm_offline.calibration.calibrated_model import Calibrated
from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.family import Family
from permllm_offline.model.modules import decoder_layers
from permllm_offline.permutation.learned_span import learned_span
from permllm_offline.pruning.layerwise import relative_error
from permllm_offline.run.steps import Step, Work

WINDOWS = 2
"""Held-out windows on which the errors are measured: the dense model's states of all layers are
kept for them."""


def layer_outputs(model: Any, family: Family, windows: Tensor) -> Iterator[Tensor]:
    """Yield the output of each decoder layer: [windows, sequence_length, hidden], on the CPU."""
    calls = record_calls(model, family, windows)
    states = calls.states
    for layer, call in zip(decoder_layers(model, family.layers), calls.layers, strict=True):
        states = run_windows(layer, states, call)
        yield states.hidden


def kept_outputs(work: Work, model: Any, family: Family, windows: Tensor) -> Sequence[Tensor]:
    """Outputs of the dense model's decoder layers on the first windows, computed once."""

    def compute() -> Step:
        return Step({"outputs": torch.stack(list(layer_outputs(model, family, windows[:WINDOWS])))})

    return list(work.step("dense-outputs", compute).tensors["outputs"])


def output_errors(
    model: Any, family: Family, windows: Tensor, dense: Sequence[Tensor]
) -> list[float]:
    """Relative squared error of each decoder layer's output, errors before it included.

    Args:
        model: pruned.
        family: names of its modules.
        windows: int64 [windows, sequence_length], of which the first are run.
        dense: of ``kept_outputs``.
    """
    outputs = layer_outputs(model, family, windows[:WINDOWS])
    return [relative_error(mine, other) for mine, other in zip(outputs, dense, strict=True)]


@torch.no_grad()
def reallocated_errors(
    calibrated: Calibrated, windows: Tensor, dense: Sequence[Tensor]
) -> list[float]:
    """What ``output_errors`` would be with the heuristic reallocation of every decoder layer.

    Args:
        calibrated: the dense model, which stays dense, and its scores.
        windows: int64 [windows, sequence_length], of which the first are run.
        dense: of ``kept_outputs``.
    """
    calls = record_calls(calibrated.model, calibrated.plan.family, windows[:WINDOWS])
    states, errors = calls.states, []
    for index, target in enumerate(dense):
        with learned_span(calibrated, range(index, index + 1), (), calls.layers) as span:
            states = span.run(span.initial, states)
        errors.append(relative_error(states.hidden, target))
    return errors
