"""Which decoder layers learn their permutations, and in which spans."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import Calibrated
from permllm_offline.errors import OfflineError
from permllm_offline.model.decoder_calls import LayerCall, run_windows
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.states import States
from permllm_offline.permutation.learned_span import cosine_distance, learned_span
from permllm_offline.recipe.schema import LearningRecipe

SENSITIVITIES = "sensitivities"
"""Name under which the sensitivities of decoder layers are kept."""

_COUNTED = re.compile(r"(last|auto|spread):(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class LayerChoice:
    """Numbers of the decoder layers, or how many of them to choose by their sensitivity."""

    layers: Sequence[int]
    most_sensitive: int | None = None


def parse_layers(text: str, count: int, pruned: Sequence[int] | None = None) -> LayerChoice:
    """Read ``all``, ``spread:N``, ``last:N``, ``auto:N``, or a list such as ``0,3,10-12``.

    ``spread:N`` takes the middle one of each of N equal parts of the model. Layers of which nothing
    is pruned are passed over.

    Args:
        text: ``layers`` of the recipe's ``learning``.
        count: decoder layers of the model.
        pruned: numbers of those of which something is pruned, ascending; by default all.

    Raises:
        OfflineError: none of these, or a layer that the model does not have or leaves dense.
    """
    pruned = range(count) if pruned is None else pruned
    if text == "all":
        return LayerChoice(pruned)
    counted = _COUNTED.fullmatch(text)
    if counted is not None:
        number = int(counted[2])
        if not 1 <= number <= len(pruned):
            which = "" if len(pruned) == count else " that are not left dense"
            raise OfflineError(
                f"learning.layers {text}: the model has {len(pruned)} decoder layers{which}. Give "
                f"a number from 1 to {len(pruned)}."
            )
        if counted[1] == "auto":
            return LayerChoice((), most_sensitive=number)
        if counted[1] == "spread":
            middles = [(2 * part + 1) * len(pruned) // (2 * number) for part in range(number)]
            return LayerChoice([pruned[middle] for middle in middles])
        return LayerChoice(pruned[-number:])
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise OfflineError(
                f"learning.layers {text!r} is not understood: give all, spread:N, last:N, auto:N, "
                "or a list of numbers and ranges such as 0,3,10-12."
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise OfflineError(
                f"learning.layers {text}: {part.strip()} is no layer or range of them. The model "
                f"has the decoder layers 0 to {count - 1}."
            )
        learning = [layer for layer in pruned if first <= layer <= last]
        if not learning:
            raise OfflineError(
                f"learning.layers {text}: nothing of {part.strip()} is pruned, so there is nothing "
                "to learn. Give layers that --ignore does not leave dense."
            )
        chosen.update(learning)
    return LayerChoice(sorted(chosen))


def spans(constants: LearningRecipe, learned: Collection[int], count: int) -> list[range]:
    """Cut the decoder layers into the spans that are learned, or only passed, one by one.

    With the scope of a model, all from the first layer that learns to the last one of the model
    are one span; the layers before it do not change and are another.
    """
    if constants.scope == "window":
        return [
            range(start, min(start + constants.window, count))
            for start in range(0, count, constants.window)
        ]
    first = min(learned)
    return [span for span in (range(first), range(first, count)) if span]


def reads_last_states(constants: LearningRecipe) -> bool:
    """Whether learning reads the dense model's last hidden states.

    It does end to end, and where sensitivities choose the layers; a window has targets of its own.
    """
    counted = _COUNTED.fullmatch(constants.layers)
    return constants.scope == "model" or (counted is not None and counted[1] == "auto")


def trained_share(
    constants: LearningRecipe, count: int, pruned: Sequence[int] | None = None
) -> float:
    """Passes through decoder layers in one learning step of every span, over ``count``.

    Which layers ``auto:N`` takes is known only when their sensitivities are: it is the mean over
    all choices of N layers.
    """
    pruned = range(count) if pruned is None else pruned
    number = parse_layers(constants.layers, count, pruned).most_sensitive
    if number is None:
        return sum(map(len, trained_spans(constants, count, pruned))) / count
    every = math.comb(len(pruned), number)
    if constants.scope == "model":  # from the first of them on; so many choices have it there
        return (
            sum(
                (count - first) * math.comb(len(pruned) - place - 1, number - 1)
                for place, first in enumerate(pruned)
            )
            / every
            / count
        )
    return (
        sum(
            len(span) * (1 - math.comb(len(pruned) - len(set(span) & set(pruned)), number) / every)
            for span in spans(constants, (), count)
        )
        / count
    )


def trained_spans(
    constants: LearningRecipe, count: int, pruned: Sequence[int] | None = None
) -> list[range]:
    """The spans that learn; with ``auto:N`` all that may."""
    choice = parse_layers(constants.layers, count, pruned)
    learned = choice.layers or (range(count) if pruned is None else pruned)
    return [span for span in spans(constants, learned, count) if set(span) & set(learned)]


@torch.no_grad()
def sensitivities(
    calibrated: Calibrated, calls: Sequence[LayerCall], states: States, targets: Tensor
) -> list[float]:
    """Measure, for each decoder layer, the loss of a dense model in which it alone is pruned.

    Pruned by the heuristic reallocation; the loss is that of learning, Eq. 10.

    Args:
        calibrated: the dense model and its scores.
        calls: of each decoder layer's call.
        states: what enters the first decoder layer.
        targets: [windows, sequence_length, hidden], what leaves the last one.
    """
    layers, found = decoder_layers(calibrated.model, calibrated.plan.family.layers), []
    for index in tqdm(range(len(layers)), "sensitivity", unit="layer"):
        with learned_span(calibrated, range(index, index + 1), (), calls) as span:
            pruned = span.run(span.initial, states)
        for later in range(index + 1, len(layers)):
            pruned = run_windows(layers[later], pruned, calls[later])
        found.append(float(cosine_distance(pruned.hidden, targets)))
        states = run_windows(layers[index], states, calls[index])
    return found


def sensitivity_passes(count: int) -> int:
    """Passes of a window through decoder layers in ``sensitivities``: of those behind each, too.

    Args:
        count: decoder layers of the model.
    """
    return sum(1 + (count - index) for index in range(count))


def most_sensitive(
    found: Sequence[float], number: int, pruned: Sequence[int] | None = None
) -> list[int]:
    """Numbers of the layers with the largest sensitivities, ascending, out of the pruned ones."""
    pruned = range(len(found)) if pruned is None else pruned
    ranked = sorted(pruned, key=lambda index: -found[index])
    return sorted(ranked[:number])
