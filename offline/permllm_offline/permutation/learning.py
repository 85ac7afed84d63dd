"""Learn the permutations of a model (PermLLM, arXiv 2510.10136): they move, weights do not.

Every shared-input group of a decoder layer that learns has its own logits. They move span by span
of decoder layers: in the scope of a model all in one, end to end; in that of a window a few layers
at a time, fed by the pruned layers before them and compared with the dense ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from permllm_offline.calibration.calibrated_model import (
    Calibrated,
    LearnedPermutations,
    LearningCurve,
)
from permllm_offline.model.decoder_calls import LayerCall, record_calls, run_windows
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.states import States
from permllm_offline.permutation.learned_layers import (
    SENSITIVITIES,
    most_sensitive,
    parse_layers,
    sensitivities,
    spans,
)
from permllm_offline.permutation.learned_span import (
    LearnedSpan,
    fixed_permutations,
    learned_span,
)
from permllm_offline.permutation.span_learning import learn_span
from permllm_offline.run.steps import Step
from permllm_offline.text.windows import require_windows

SENSITIVITY_WINDOWS = 4
"""Windows on which the sensitivity of each decoder layer is measured."""


def learn_permutations(calibrated: Calibrated) -> LearnedPermutations:
    """Learn the permutations of a model, or of some of its decoder layers.

    The permutations of each span are those with the lowest loss on calibration windows held out
    from learning, those at the start included. What is learned of a span is a step that
    ``calibrated.work`` keeps.

    Raises:
        OfflineError: too few calibration windows to hold some out, or a loss that is not finite.
    """
    constants = calibrated.recipe.learning
    windows, hidden_states = calibrated.windows, calibrated.hidden_states
    assert windows is not None
    held_out = constants.validation_windows
    require_windows(len(windows), constants.windows_per_step, held_out, "learn from", "step")
    model, family = calibrated.model, calibrated.plan.family
    calls = record_calls(model, family, windows)
    layers = decoder_layers(model, family.layers)
    chosen, measured = _choose(calibrated, calls.layers, calls.states, hidden_states)
    pruned = dense = calls.states
    permutations: list[Mapping[str, Tensor]] = []
    curve: LearningCurve = []
    for span in spans(constants, chosen, len(layers)):
        feeds = span.stop <= max(chosen)
        if constants.scope == "window":
            for index in span:
                dense = run_windows(layers[index], dense, calls.layers[index])
            targets = dense.hidden
        else:
            assert hidden_states is not None
            targets = hidden_states
        if not set(span) & set(chosen):
            fixed, passed = fixed_permutations(
                calibrated, span, calls.layers, pruned if feeds else None
            )
            permutations += fixed
            pruned = pruned if passed is None else passed
            continue
        with learned_span(calibrated, span, chosen, calls.layers) as learned:
            order, more = learned_once(calibrated, learned, span, pruned, targets)
            curve += numbered(more, curve, span)
            permutations += learned.permutations(order)
            if feeds:
                pruned = learned.run(order, pruned)
    return LearnedPermutations(permutations, curve, chosen, measured)


def _choose(
    calibrated: Calibrated,
    calls: Sequence[LayerCall],
    states: States,
    hidden_states: Tensor | None,
) -> tuple[list[int], list[float] | None]:
    """The layers that learn, and the sensitivities where these decided."""
    plan = calibrated.plan
    choice = parse_layers(calibrated.recipe.learning.layers, len(plan.layers), plan.pruned_layers)
    if choice.most_sensitive is None:
        return list(choice.layers), None
    assert hidden_states is not None
    few = slice(SENSITIVITY_WINDOWS)
    measure = partial(sensitivities, calibrated, calls, states[few], hidden_states[few])
    step = calibrated.work.step(SENSITIVITIES, lambda: Step(facts={"values": measure()}))
    found = step.facts["values"]
    return most_sensitive(found, choice.most_sensitive, plan.pruned_layers), found


def learned_once(
    calibrated: Calibrated, learned: LearnedSpan, span: range, states: States, targets: Tensor
) -> tuple[Tensor, LearningCurve]:
    """What ``learn_span`` gives, as a step that ``calibrated.work`` keeps."""
    name = f"learned-{span.start:04d}"
    of_model = len(span) / len(calibrated.plan.layers)

    def compute() -> Step:
        order, curve = learn_span(calibrated, learned, name, states, targets, of_model)
        return Step({"order": order}, {"curve": curve})

    step = calibrated.work.common_step(name, compute)
    return step.tensors["order"], step.facts["curve"]


def numbered(curve: LearningCurve, before: LearningCurve, span: range) -> LearningCurve:
    """Count the steps of a span on from those of the spans before it, and name its layers."""
    first = before[-1]["step"] + 1 if before else 0
    layers = {"first_layer": span.start, "last_layer": span.stop - 1}
    return [entry | {"step": first + entry["step"]} | layers for entry in curve]
