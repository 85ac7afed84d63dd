"""Learn the permutations of a model of which one span of decoder layers at a time is in memory.

What ``learn_permutations`` finds in the scope of a window, to the same bits: text passes a span
densely, which gives scores and targets, the span learns, and the text passes it with the masks that
follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import (
    Calibrated,
    LearnedPermutations,
    LearningCurve,
)
from permllm_offline.calibration.kept_statistics import by_layer, named_by_layer
from permllm_offline.calibration.statistics import mean_norms, summed_squares
from permllm_offline.permutation.learned_layers import parse_layers, spans
from permllm_offline.permutation.learned_span import fixed_permutations, learned_span
from permllm_offline.permutation.learning import learned_once, numbered
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.pruning.layerwise import PASSES, relative_error
from permllm_offline.pruning.output_errors import WINDOWS
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.pruning.streamed_windows import Flow, load_states, with_states, without_states
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.steps import Step, Work
from permllm_offline.sparsity.group_scores import group_scores

_LEARNED = "learned"
_TEXT, _HELD_OUT = "calibration", "held-out"


@dataclass
class StreamedLearning:
    """What the spans gave that were passed so far, in order.

    ``permutations`` and ``curve`` are as in ``LearnedPermutations``; ``start_errors`` are the
    errors of each decoder layer with the reallocation in place of what is learned, where windows
    are held out.
    """

    permutations: list[Mapping[str, Tensor]] = field(default_factory=list)
    curve: LearningCurve = field(default_factory=list)
    start_errors: list[float] = field(default_factory=list)

    def step(self) -> Step:
        """The results as a step that can be kept."""
        facts = {"layers": len(self.permutations), "curve": self.curve}
        return Step(named_by_layer(self.permutations), facts | {"start_errors": self.start_errors})

    @classmethod
    def of(cls, step: Step) -> StreamedLearning:
        """Read what ``step`` gave."""
        facts = step.facts
        permutations = by_layer(step.tensors, facts["layers"])
        return cls([*permutations], facts["curve"], facts["start_errors"])


def learn_streamed(
    recipe: Recipe, prepared: Prepared, work: Work, streamed: StreamedModel
) -> tuple[LearnedPermutations, list[float]]:
    """Learn the permutations of a model, or of some of its decoder layers, window by window.

    What a span learned is a step that ``work`` keeps, and so are, until all are learned, the hidden
    states behind it: a run that was cut off goes on from them.

    Returns:
        The permutations, and ``StreamedLearning.start_errors``.

    Raises:
        OfflineError: a loss that is not finite.
    """
    plan = prepared.plan
    choice = parse_layers(recipe.learning.layers, len(plan.layers), plan.pruned_layers)
    chosen = list(choice.layers)
    found = StreamedLearning()
    if not work.finished(_LEARNED):
        found = _pass_spans(recipe, prepared, work, streamed, chosen)
    found = StreamedLearning.of(work.step(_LEARNED, found.step))
    return LearnedPermutations(found.permutations, found.curve, chosen), found.start_errors


def _pass_spans(
    recipe: Recipe, prepared: Prepared, work: Work, streamed: StreamedModel, chosen: Collection[int]
) -> StreamedLearning:
    """Pass the spans that no text has passed yet, and learn those that learn."""
    windows, constants, plan = prepared.windows, recipe.learning, prepared.plan
    assert windows is not None
    flows = {_TEXT: Flow.into(streamed, windows.calibration)}
    if len(windows.held_out):
        flows[_HELD_OUT] = Flow.into(streamed, windows.held_out[:WINDOWS])
    found = _go_on(work, flows)
    importance = parts_of(recipe).importance
    norms: dict[int, Mapping[str, Tensor]] = {}
    calibrated = Calibrated(
        streamed.model,
        plan,
        recipe,
        windows.calibration,
        None,
        lambda index, layout: group_scores(
            importance, streamed.layers[index], layout, norms[index]
        ),
        work=work,
    )
    count, passed = len(plan.layers), len(found.permutations)
    with tqdm(desc="learning", unit="layer", initial=passed, total=count) as progress:
        for span in spans(constants, chosen, count):
            if span.start < passed:
                continue
            with ExitStack() as resident:
                for index in span:
                    layer = resident.enter_context(streamed.resident(index))
                    norms[index] = _pass_dense(calibrated, index, layer, flows)
                    if _HELD_OUT in flows:
                        with work.measured("output-errors"):
                            error = _start_error(calibrated, index, flows[_HELD_OUT])
                        found.start_errors.append(error)
                _learn_span(calibrated, span, chosen, flows[_TEXT], found)
            with work.measured(PASSES):
                work.keep_interval(_LEARNED, with_states(found.step(), flows))
            progress.update(len(span))
    return found


def _go_on(work: Work, flows: Mapping[str, Flow]) -> StreamedLearning:
    """Put kept hidden states into the flows, and return the results that belong to them."""
    kept = work.interval(_LEARNED)
    if kept is None:
        return StreamedLearning()
    load_states(kept, flows)
    return StreamedLearning.of(without_states(kept))


def _pass_dense(
    calibrated: Calibrated, index: int, layer: nn.Module, flows: Mapping[str, Flow]
) -> dict[str, Tensor]:
    """Pass a decoder layer with its dense weights; the norms of the calibration text come back."""
    text, groups = flows[_TEXT], calibrated.plan.groups(index)
    with calibrated.work.measured(PASSES):
        with summed_squares(layer, groups) as squares:
            text.pass_dense(index, layer)
        if _HELD_OUT in flows:
            flows[_HELD_OUT].pass_dense(index, layer)
    return mean_norms(layer, groups, squares, text.tokens)


def _start_error(calibrated: Calibrated, index: int, held_out: Flow) -> float:
    """Pass a decoder layer with its reallocation, behind others with theirs."""
    span = range(index, index + 1)
    with learned_span(calibrated, span, (), held_out.calls) as reallocated:
        held_out.pruned = reallocated.run(reallocated.initial, held_out.pruned)
    return relative_error(held_out.pruned.hidden, held_out.dense.hidden)


def _learn_span(
    calibrated: Calibrated,
    span: range,
    chosen: Collection[int],
    text: Flow,
    found: StreamedLearning,
) -> None:
    """Learn what learns of a span that the text has passed densely, and pass it pruned."""
    feeds = span.stop <= max(chosen)
    if not set(span) & set(chosen):
        with calibrated.work.measured(PASSES):
            states = text.pruned if feeds else None
            fixed, states = fixed_permutations(calibrated, span, text.calls, states)
        found.permutations += fixed
        text.pruned = text.pruned if states is None else states
        return
    with learned_span(calibrated, span, chosen, text.calls) as learned:
        order, curve = learned_once(calibrated, learned, span, text.pruned, text.dense.hidden)
        found.curve += numbered(curve, found.curve, span)
        found.permutations += learned.permutations(order)
        if feeds:
            with calibrated.work.measured(PASSES):
                text.pruned = learned.run(order, text.pruned)
