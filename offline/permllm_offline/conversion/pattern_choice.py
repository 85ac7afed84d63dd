"""Judge a whole source: under which pattern and block size can most of it be stored?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from permllm_offline.conversion.channel_order import Judge
from permllm_offline.conversion.group_verdict import GroupVerdict
from permllm_offline.conversion.smallest_block import BlockSearch
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Family
from permllm_offline.model.loading import DTYPES
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern

_BLOCK_SIZES_BY_PREFERENCE = (64, 128, 32)


@dataclass(frozen=True)
class Judged:
    """A source with the verdicts on all its decoder layers."""

    source: WeightSource
    family: Family
    pattern: Pattern
    block_size: int
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


def judge(
    source: WeightSource,
    family: Family,
    config: Any,
    pattern: Pattern | None,
    block_size: int | None,
) -> Judged:
    """Judge all decoder layers, of a transformers configuration; what is None is chosen.

    The pattern becomes the strictest that most linears obey; the block size the first of 64, 128
    and 32 that explains the first sparse decoder layer.
    """

    def under(pattern: Pattern) -> Judged:
        def at(size: int) -> Judge:
            return Judge(source, family, config, pattern, size, search)

        size = block_size or _choose_block_size(at, count)
        judge = at(size)
        layers = [judge.layer(i) for i in tqdm(range(count), desc=f"judge as {pattern}")]
        return Judged(source, family, pattern, size, layers)

    search, count = BlockSearch(), _layer_count(source, family, config)
    if pattern is not None:
        return under(pattern)
    tried: list[Judged] = []
    for text in SUPPORTED:
        tried.append(under(Pattern.parse(text)))
        if tried[-1].every_linear_holds:
            return tried[-1]
    return max(tried, key=lambda one: one.holding)  # of equal ones the first, which is stricter


def _layer_count(source: WeightSource, family: Family, config: Any) -> int:
    """How many decoder layers the model has of those stored; later ones predict more tokens."""
    return min(len(stored_layers(source, family)), config.num_hidden_layers)


def stored_layers(source: WeightSource, family: Family) -> set[str]:
    """Return what stands for the number of a decoder layer in the names of a source's tensors."""
    stack = family.stack
    names = (name.removeprefix(stack) for name in source.names() if name.startswith(stack))
    return {name.partition(".")[0] for name in names}


def _choose_block_size(at: Callable[[int], Judge], count: int) -> int:
    """Try the block sizes on the first decoder layer that is sparse enough; keep the best."""
    sizes = _BLOCK_SIZES_BY_PREFERENCE
    for index in range(count):
        holding = {}
        for size in sizes:
            verdicts = at(size).layer(index)
            holding[size] = sum(verdict.holds for verdict in verdicts)
            if holding[size] == len(verdicts):
                return size
        if any(holding.values()):
            return max(sizes, key=lambda size: holding[size])
    return sizes[0]
