"""Which decoder layers learn their permutations, and in which spans."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.calibrated import Calibrated
from permllm_offline.errors import OfflineError
from permllm_offline.model.decoder_calls import run_windows
from permllm_offline.model.modules import decoder_layers
from permllm_offline.permutation.learned_span import cosine_distance, learned_span
from permllm_offline.recipe_schema import LearningRecipe
from permllm_offline.run.steps import Step

SENSITIVITIES = "sensitivities"
"""Name under which the sensitivities of decoder layers are kept."""

_COUNTED = re.compile(r"(last|auto|spread):(\d+)")
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True)
class LayerChoice:
    """Numbers of the decoder layers, or how many of them to choose by their sensitivity."""

    layers: Sequence[int]
    most_sensitive: int | None = None


def parse_layers(text: str, count: int) -> LayerChoice:
    """Read ``all``, ``spread:N``, ``last:N``, ``auto:N``, or a list such as ``0,3,10-12``.

    ``spread:N`` takes the middle one of each of N equal parts of the model.

    Args:
        text: of ``--learn-layers``.
        count: decoder layers of the model.

    Raises:
        OfflineError: none of these, or a layer that the model does not have.
    """
    if text == "all":
        return LayerChoice(range(count))
    counted = _COUNTED.fullmatch(text)
    if counted is not None:
        number = int(counted[2])
        if not 1 <= number <= count:
            raise OfflineError(
                f"--learn-layers {text}: the model has {count} decoder layers. Give a number from "
                f"1 to {count}."
            )
        if counted[1] == "auto":
            return LayerChoice((), most_sensitive=number)
        if counted[1] == "spread":
            return LayerChoice([(2 * part + 1) * count // (2 * number) for part in range(number)])
        return LayerChoice(range(count - number, count))
    chosen: set[int] = set()
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            raise OfflineError(
                f"--learn-layers {text!r} is not understood: give all, spread:N, last:N, auto:N, "
                "or a list of numbers and ranges such as 0,3,10-12."
            )
        first, last = int(found[1]), int(found[2] or found[1])
        if not first <= last < count:
            raise OfflineError(
                f"--learn-layers {text}: {part.strip()} is no layer or range of them. The model "
                f"has the decoder layers 0 to {count - 1}."
            )
        chosen.update(range(first, last + 1))
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


def trained_share(constants: LearningRecipe, count: int) -> float:
    """Passes through decoder layers in one learning step of every span, over ``count``.

    Which layers ``auto:N`` takes is known only when their sensitivities are: it is the mean over
    all choices of N layers.
    """
    number = parse_layers(constants.layers, count).most_sensitive
    if number is None:
        return sum(map(len, _trained(constants, count))) / count
    if constants.scope == "model":  # from the first of them on
        return (count - (count - number) / (number + 1)) / count
    every = math.comb(count, number)
    return (
        sum(
            len(span) * (1 - math.comb(count - len(span), number) / every)
            for span in spans(constants, (), count)
        )
        / count
    )


def largest_span(constants: LearningRecipe, count: int) -> float:
    """Decoder layers that the backward pass of one step holds at most, over ``count``."""
    return max(map(len, _trained(constants, count))) / count


def _trained(constants: LearningRecipe, count: int) -> list[range]:
    choice = parse_layers(constants.layers, count)
    learned = choice.layers or range(count)
    return [span for span in spans(constants, learned, count) if set(span) & set(learned)]


@torch.no_grad()
def sensitivities(
    calibrated: Calibrated, keywords: Sequence[Mapping[str, Any]], states: Tensor, targets: Tensor
) -> list[float]:
    """Measure, for each decoder layer, the loss of a dense model in which it alone is pruned.

    Pruned by the heuristic reallocation; the loss is that of learning, Eq. 10. What is measured of
    each layer is kept, and a run that was cut off goes on behind the last one.

    Args:
        calibrated: the dense model and its scores.
        keywords: of each decoder layer's call.
        states: [windows, sequence_length, hidden], what enters the first decoder layer.
        targets: [windows, sequence_length, hidden], what leaves the last one.
    """
    layers, work = decoder_layers(calibrated.model, calibrated.plan.family.layers), calibrated.work
    kept, found = work.alone.interval(SENSITIVITIES), []
    if kept is not None:
        states, found = kept.tensors["states"], list(kept.facts["values"])
    left = range(len(found), len(layers))
    for index in tqdm(left, "sensitivity", unit="layer", initial=left.start, total=left.stop):
        with learned_span(calibrated, range(index, index + 1), (), keywords) as span:
            pruned = span.run(span.initial, states)
        for later in range(index + 1, len(layers)):
            pruned = run_windows(layers[later], pruned, keywords[later])
        found.append(float(cosine_distance(pruned, targets)))
        states = run_windows(layers[index], states, keywords[index])
        work.alone.keep_interval(SENSITIVITIES, Step({"states": states}, {"values": found}))
    return found


def sensitivity_passes(count: int) -> int:
    """Passes of a window through decoder layers in ``sensitivities``: of those behind each, too.

    Args:
        count: decoder layers of the model.
    """
    return sum(1 + (count - index) for index in range(count))


def most_sensitive(found: Sequence[float], number: int) -> list[int]:
    """Numbers of the layers with the largest sensitivities, ascending."""
    ranked = sorted(range(len(found)), key=lambda index: -found[index])
    return sorted(ranked[:number])
