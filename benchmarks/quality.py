"""Records of quality as tables and as a figure: perplexity, times dense, against bits a weight.

Those of `benchmarks.efforts`, and older ones, whose rows lack the effort (the whole record has one)
and the bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from benchmarks.records.markdown import Result, markdown

DENSE = "dense"
DEFAULT_METHOD = "permllm-best"
GROUP, SCALE_BITS = 64, 16
"""Of dense int4 and int3: inputs that share a scale, and its size."""
SPARSE_BITS = {"bfloat16": 9.0, "int8": 5.0, "int4": 3.125}
"""Of a checkpoint at half density: values, one bit of the mask, and of int4 a step of 8 bits for 64
inputs. Scales of output channels are a hundredth of a bit and less."""

Link = Callable[[str, str], str]


def dense_bits(values: str) -> float:
    """Bits of a dense weight, its share of a scale included."""
    bits = {"bfloat16": 16, "int8": 8, "int4": 4, "int3": 3}[values]
    return bits + SCALE_BITS / GROUP if bits < 8 else float(bits)


@dataclass(frozen=True)
class Quality:
    """One model: all rows that differ in the seed alone.

    Attributes:
        ratios: perplexity over the dense model's, by text: one for each seed.
    """

    method: str
    pattern: str | None
    effort: str | None
    values: str
    servable: bool
    bits: float
    ratios: Mapping[str, Sequence[float]]
    minutes: float | None

    @property
    def name(self) -> str:
        """What it is called in a table."""
        if self.method == DENSE:
            kind = {"bfloat16": "", "int8": " (W8A8)"}.get(self.values, f", groups of {GROUP}")
            return f"dense {self.values}{kind}"
        shown = f"{self.pattern} {self.values}"
        if self.method != DEFAULT_METHOD:
            shown += f", `{self.method}`"
        elif self.effort is not None:
            shown += f", effort {self.effort}"
        return shown if self.servable else f"{shown} (no checkpoint)"

    def cells(self, name: str = "") -> list[str]:
        """A line of a table; `name` stands in place of its own."""
        minutes = "" if self.minutes is None else f"{self.minutes:.0f}"
        return [name or self.name, f"{self.bits:.2f}", *map(_range, self.ratios.values()), minutes]


def _range(ratios: Sequence[float]) -> str:
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
    return f"{mean(ratios):.2f}{spread}"


def qualities(result: Result) -> Iterator[Quality]:
    """The models of a record, with the texts that every seed of each was evaluated on."""
    found: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in result["rows"]:
        method, pattern = row.get("method", DENSE), row.get("pattern")
        effort = None if method == DENSE else row.get("effort", result.get("effort"))
        key = method, pattern, effort, row["values"]
        found.setdefault(key, []).append(row)
    for (method, pattern, effort, values), rows in found.items():
        texts = [text for text in rows[0]["ratio"] if all(text in row["ratio"] for row in rows)]
        bits = dense_bits(values) if method == DENSE else SPARSE_BITS[values]
        times = [row["processor_seconds"] for row in rows if row.get("processor_seconds")]
        yield Quality(
            *(method, pattern, effort, values),
            servable=rows[0].get("servable", True),
            bits=rows[0].get("bits_per_weight", bits),
            ratios={text: [row["ratio"][text] for row in rows] for text in texts},
            minutes=mean(times) / 60 if times else None,
        )


def methods(result: Result) -> str:
    """A line for each model of a record."""
    return _table([(line, "") for line in qualities(result)])


def default_method(records: Mapping[str, Result], link: Link) -> str:
    """The same of several records: dense models, each once, and those of the default method."""
    shown = []
    for name, line in _chosen(records):
        shown.append((line, link(name, line.name)))
    return _table(shown)


def _chosen(records: Mapping[str, Result]) -> Iterator[tuple[str, Quality]]:
    dense = set()
    for name, result in records.items():
        for line in qualities(result):
            if line.method == DEFAULT_METHOD or (line.method == DENSE and line.name not in dense):
                dense |= {line.name} if line.method == DENSE else set()
                yield name, line


def _table(lines: Sequence[tuple[Quality, str]]) -> str:
    texts = list(lines[0][0].ratios)
    header = ["model", "bits a weight", *texts, "processor minutes"]
    return markdown(header, [line.cells(name) for line, name in lines])


def draw(records: Mapping[str, Result], axes: Sequence[Any]) -> None:
    """Draw quality lost against bits a weight: a panel for each text, a line for each series.

    A series is what differs in the values alone.
    """
    series: dict[str, list[Quality]] = {}
    for _, line in _chosen(records):
        pruned = f"{line.pattern}, effort {line.effort}"
        series.setdefault(DENSE if line.method == DENSE else pruned, []).append(line)
    texts = list(next(iter(series.values()))[0].ratios)
    for place, text in zip(axes, texts, strict=True):
        for name, lines in series.items():
            points = sorted((line.bits, mean(line.ratios[text])) for line in lines)
            dashed = "--" if name == DENSE else "-"
            place.plot(*zip(*points, strict=True), dashed, marker="o", markersize=4, label=name)
        place.set_title(text, fontsize="medium")
        place.set_xscale("log", base=2)
        place.set_xticks([3, 4, 5, 8, 9, 16], ["3", "4", "5", "8", "9", "16"])
        place.minorticks_off()
        place.set_xlabel("bits a weight")
        place.grid(alpha=0.3)
    axes[0].set_ylabel("perplexity, times dense's")
    handles, names = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, names, loc="outside lower center", ncols=4, fontsize="small")
