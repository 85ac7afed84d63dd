"""How much calibration text, and which: addresses, technical text, text of the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import MANY_CELLS, SharedStatistics, Subject
from permllm_offline.calibration.statistics import DenseStatistics, collect
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.text.own_text import OwnText
from permllm_offline.text.windows import CalibrationWindows, sample_windows

CHEAP, SECOND, UPDATED, LEARNED = "wanda+cp", "ria", "wanda+cp/obs", "permllm-wanda"
"""Methods whose masks follow from norms of the inputs alone, and one that learns, which takes as
many steps whatever there is to read."""

SHARES = (0.25, 1, 4, 8)
"""Of the windows that other studies calibrate on."""

HELD_OUT = 4
"""Windows on which the best learned permutations are chosen, of a fourth of all at most."""

OWN, ALL = "the model itself", "all three"

Squares = list[dict[str, Tensor]]
"""Per decoder layer, group -> squares of each input channel, summed over windows."""


class Calibrations:
    """Windows of each source, and what the dense model makes of the first ones of them.

    Windows are half as long as elsewhere: the question is how many and of what.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.length = subject.sizes.sequence_length // 2
        self.counts = [round(share * subject.sizes.calibration_windows) for share in SHARES]
        self.sources = [*subject.sources, OWN]
        self._windows: dict[str, Tensor] = {}
        self._squares: dict[tuple[str, int], Squares] = {}

    def cells(self) -> Sequence[tuple[str, str, int]]:
        """Method, source and windows of each measurement, the most telling ones first."""
        first, (few, usual, many, most) = self.sources[0], self.counts
        found = [(CHEAP, source, n) for source in self.sources for n in self.counts]
        found.append((CHEAP, ALL, len(self.sources) * usual))
        found += [(UPDATED, first, usual), (UPDATED, OWN, usual)]
        found += [(SECOND, first, n) for n in (few, most)]
        found += [(SECOND, OWN, many), (UPDATED, first, few)]
        found += [(LEARNED, first, n) for n in self.counts]
        return [*found, (LEARNED, OWN, usual)]

    def windows(self, source: str, count: int) -> Tensor:
        """The first windows of a source: int64 [count, length]."""
        if source == ALL:
            each = count // len(self.sources)
            return torch.cat([self.windows(one, each) for one in self.sources])
        if source not in self._windows:
            self._windows[source] = self._read(source, self.counts[-1])
        return self._windows[source][:count]

    def _read(self, source: str, count: int) -> Tensor:
        model = self.subject.source
        if source == OWN:
            own = OwnText(model, model.dtype, torch.device("cpu"), self.length, seed=0)
            return own.windows(count)
        return sample_windows(
            [str(self.subject.sources[source])],
            load_tokenizer(model),
            num_samples=count,
            sequence_length=self.length,
            seed=0,
        ).calibration

    def norms(self, source: str, count: int) -> list[dict[str, Tensor]]:
        """Norms over the first windows of a source."""
        if source == ALL:
            each = count // len(self.sources)
            total = self._sum([self.squares(one, each) for one in self.sources])
        else:
            total = self.squares(source, count)
        return [{g: (square / count).sqrt() for g, square in layer.items()} for layer in total]

    def squares(self, source: str, count: int) -> Squares:
        """Squares over the first windows of a source; each window is run once for all counts."""
        if (source, count) not in self._squares:
            before = max((n for s, n in self._squares if s == source and n < count), default=0)
            more = self.windows(source, count)[before:]
            found = collect(self._dense, self.subject.family, more, hidden_states=False).norms
            squares = [{g: n.square() * len(more) for g, n in layer.items()} for layer in found]
            earlier = [self._squares[source, before]] if before else []
            self._squares[source, count] = self._sum([*earlier, squares])
        return self._squares[source, count]

    @staticmethod
    def _sum(parts: Sequence[Squares]) -> Squares:
        return [
            {group: torch.stack([one[group] for one in layer]).sum(0) for group in layer[0]}
            for layer in zip(*parts, strict=True)
        ]

    @cached_property
    def _dense(self) -> Any:
        return self.subject.load()

    def measured(self, method: str, source: str, count: int) -> dict[str, Any]:
        """Prune by these windows, and measure the perplexity."""
        name, _, reconstruction = method.partition("/")
        windows = self.windows(source, count)
        learning = {"validation_windows": max(1, min(HELD_OUT, count // 4))}
        recipe = self.subject.recipe(name, reconstruction=reconstruction or None, learning=learning)
        states = None
        if method == LEARNED:
            family = self.subject.family
            states = collect(self._dense, family, windows, hidden_states=True).hidden_states
        prepared = replace(
            self.subject.prepared(recipe), windows=CalibrationWindows(windows, windows[:0])
        )
        work = SharedStatistics(DenseStatistics(self.norms(source, count), states))
        return {"perplexity": self.subject.perplexity(prune_model(recipe, prepared, work).model)}


def measure(subject: Subject, cells: Cells) -> None:
    """Prune by more and more windows of each source."""
    cells.row({"method": "dense"}, subject.dense)
    calibrations = Calibrations(subject)
    for method, source, count in calibrations.cells():
        key = {"method": method, "source": source, "samples": count}
        cells.row(key, partial(calibrations.measured, method, source, count))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of the cheap method by windows, a line for each source and text."""
    kept = [row for row in rows if row["method"] == CHEAP and row["source"] != ALL]
    for number, source in enumerate(dict.fromkeys(row["source"] for row in kept)):
        mine = [row for row in kept if row["source"] == source]
        counts = [row["samples"] for row in mine]
        for domain, style in zip(kept[0]["perplexity"], ("o-", "s--"), strict=True):
            values = [row["perplexity"][domain] for row in mine]
            label = f"{source}: {domain}"
            axes.plot(counts, values, style, color=f"C{number}", label=label, markersize=4)
    axes.set(xscale="log", xlabel="calibration samples", ylabel=f"perplexity, {CHEAP}")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


STUDY = Study(
    "how much calibration text, and of which source",
    ("method", "source", "samples"),
    measure,
    draw,
    MANY_CELLS,
)
