"""Judge a whole source: under which pattern can most of it be stored, and what stays dense?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from permllm_offline.conversion.sources import WeightSource
from permllm_offline.conversion.verdicts import GroupVerdict, Judge
from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Family
from permllm_offline.model.loading import DTYPES
from permllm_offline.model.renaming import stored_part
from permllm_vllm.checkpoint.ignoring import MOST_REGEXES, REGEX_PREFIX
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern


@dataclass(frozen=True)
class Judged:
    """A source with the verdicts on all its decoder layers."""

    source: WeightSource
    family: Family
    pattern: Pattern
    layers: Sequence[Sequence[GroupVerdict]]

    @property
    def every_linear_holds(self) -> bool:
        """Whether nothing has to stay dense."""
        return all(verdict.holds for layer in self.layers for verdict in layer)

    @property
    def holding(self) -> int:
        """Number of linears that can be stored."""
        return sum(
            len(verdict.layout.group.linears)
            for layer in self.layers
            for verdict in layer
            if verdict.holds
        )

    def value_dtype(self) -> Any:
        """The dtype of all sparse weights; raises OfflineError where they have several."""
        found: dict[str, str] = {}
        for index, layer in enumerate(self.layers):
            for verdict in layer:
                for linear in verdict.density if verdict.holds else ():
                    name = self.family.stored_name(index, f"{linear}.weight")
                    found.setdefault(self.source.header(name).dtype, name)
        if len(found) > 1 or not set(found) <= set(DTYPES):
            places = ", ".join(f"{name} is {dtype}" for dtype, name in found.items())
            raise OfflineError(
                f"{places}; the format has one dtype for all kept values, {', '.join(DTYPES)}. "
                "Save the model in one of them."
            )
        return next(iter(found))


def judge(source: WeightSource, family: Family, config: Any, pattern: Pattern | None) -> Judged:
    """Judge all decoder layers, of a transformers configuration.

    Without a pattern it becomes the first, and strictest, that most linears obey.
    """
    count = _layer_count(source, family, config)

    def under(pattern: Pattern) -> Judged:
        one = Judge(source, family, config, pattern)
        layers = [one.layer(i) for i in tqdm(range(count), desc=f"judge as {pattern}")]
        return Judged(source, family, pattern, layers)

    if pattern is not None:
        return under(pattern)
    judged = []
    for supported in map(Pattern.parse, SUPPORTED):
        judged.append(under(supported))
        if judged[-1].every_linear_holds:
            break
    return max(judged, key=lambda one: one.holding)


def _layer_count(source: WeightSource, family: Family, config: Any) -> int:
    """How many decoder layers the model has of those stored; later ones predict more tokens."""
    return min(len(_stored_layers(source, family)), config.num_hidden_layers)


def _stored_layers(source: WeightSource, family: Family) -> set[str]:
    """What stands for the number of a decoder layer in the names of a source's tensors."""
    stack = family.stack
    names = (name.removeprefix(stack) for name in source.names() if name.startswith(stack))
    return {name.partition(".")[0] for name in names}


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
    numbers, own = _stored_layers(judged.source, judged.family), len(judged.layers)
    further = sorted(number for number in numbers if number.isdigit() and int(number) >= own)
    stack = re.escape(judged.family.stack)
    return [rf"{REGEX_PREFIX}{stack}{_any_of(further)}\..*"] if further else []


def _any_of(numbers: list[str]) -> str:
    return numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
