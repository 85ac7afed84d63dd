"""The entries of `ignore` for what a conversion leaves dense."""

from __future__ import annotations

import re

from permllm_offline.conversion.pattern_choice import Judged, stored_layers
from permllm_offline.model.renaming import stored_part
from permllm_vllm.checkpoint.ignoring import MOST_REGEXES, REGEX_PREFIX


def ignored(judged: Judged) -> list[str]:
    """List what the family never prunes, and what does not hold: linears by their names.

    The experts of a decoder layer, hundreds of linears, are one regular expression; it stands for
    several layers where there are more of them than a reader takes expressions.
    """
    family = judged.family
    names: list[str] = []
    layers: dict[str, None] = {}
    for index, verdicts in enumerate(judged.layers):
        for verdict in verdicts:
            if not verdict.holds and verdict.layout.group.experts:
                layers[str(index)] = None
            elif not verdict.holds:
                names += [family.stored_name(index, linear) for linear in verdict.density]
    room = MOST_REGEXES - sum(entry.startswith(REGEX_PREFIX) for entry in family.ignore)
    numbers, together = list(layers), max(1, -(-len(layers) // room))
    parts = [numbers[start : start + together] for start in range(0, len(numbers), together)]
    stack = re.escape(family.stack)
    experts = re.escape(stored_part(family.experts, family.renamed))
    expressions = [rf"{REGEX_PREFIX}{stack}{_any_of(part)}\.{experts}\..*" for part in parts]
    return [*family.ignore, *names, *expressions, *_further_layers(judged)]


def _further_layers(judged: Judged) -> list[str]:
    """Layers that are stored behind the model's own, whatever its configuration says of them."""
    numbers, own = stored_layers(judged.source, judged.family), len(judged.layers)
    further = sorted(number for number in numbers if number.isdigit() and int(number) >= own)
    stack = re.escape(judged.family.stack)
    return [rf"{REGEX_PREFIX}{stack}{_any_of(further)}\..*"] if further else []


def _any_of(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
