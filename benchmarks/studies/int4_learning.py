"""Permutations that are learned while the loss sees int4 values in their order."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from benchmarks.studies.rounded_linear import RoundedLinear
from benchmarks.studies.subject import Subject
from permllm_offline.calibration.calibrated_model import Calibrated, Permutations
from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.permutation.learned_span import learned_span
from permllm_offline.permutation.span_learning import learn_span
from permllm_offline.sparsity.importance import Scores, wanda


def learn_with_int4(subject: Subject, group: int, *, sparse: bool) -> Permutations:
    """Learn the permutations of all decoder layers, end to end, as ``permllm-wanda`` does.

    Args:
        subject: its recipe's constants, windows and dense model.
        group: channels of a grid.
        sparse: learn for 2:4 values in int4, from the reallocation; else for int4 values alone,
            from the channels where they are.

    Returns:
        Per decoder layer, group -> block-local uint8 [in_features].
    """
    recipe = subject.recipe("permllm-wanda")
    plan, statistics = subject.prepared(recipe).plan, subject.statistics
    model, windows = subject.load(), subject.windows
    layers = decoder_layers(model, plan.family.layers)

    def score(index: int, layout: GroupLayout) -> Mapping[str, Scores]:
        norm = statistics.norms[index][layout.group.name]
        return {
            name: wanda(linear_of(layers[index], name).weight, norm)
            for name in layout.group.linears
        }

    calibrated = Calibrated(model, plan, recipe, windows, statistics.hidden_states, score)
    calls, every = record_calls(model, plan.family, windows), range(len(layers))
    stand_in = partial(RoundedLinear, group=group, sparse=sparse)
    assert statistics.hidden_states is not None
    with learned_span(calibrated, every, every, calls.layers, stand_in) as span:
        if not sparse:
            span.initial = torch.arange(recipe.block_size).repeat(len(span.initial), 1)
        name = "learned for both" if sparse else "learned for int4"
        order, _ = learn_span(calibrated, span, name, calls.states, statistics.hidden_states)
        return span.permutations(order)
