"""What is measured on the dense model, as steps that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from permllm_offline.calibration.statistics import DenseStatistics, PartialSums
from permllm_offline.run.steps import Step, Work

_HIDDEN, _STATISTICS = "hidden_states", "statistics"


class Measure(Protocol):
    """``calibration.statistics.collect`` with a model and windows."""

    def __call__(
        self, *, begun: PartialSums | None, keep: Callable[[PartialSums], None]
    ) -> DenseStatistics:
        """Go on from what is begun, and keep what there is now and then."""


def kept_statistics(work: Work, measure: Measure) -> DenseStatistics:
    """Statistics of the dense model, measured once, and in parts that are not lost."""

    def keep(found: PartialSums) -> None:
        step = _step(found.sums, found.hidden_states, {"windows": found.windows})
        work.alone.keep_interval(_STATISTICS, step)

    def compute() -> Step:
        kept, begun = work.alone.interval(_STATISTICS), None
        if kept is not None:
            begun = PartialSums(kept.facts["windows"], *_parts(kept))
        found = measure(begun=begun, keep=keep)
        return _step(found.norms, found.hidden_states, {})

    return DenseStatistics(*_parts(work.step(_STATISTICS, compute)))


def _step(
    layers: Sequence[Mapping[str, Tensor]], hidden_states: Tensor | None, facts: Mapping[str, Any]
) -> Step:
    """A vector of each group of each layer, and hidden states, as a step that can be kept."""
    tensors = named_by_layer(layers)
    if hidden_states is not None:
        tensors[_HIDDEN] = hidden_states
    return Step(tensors, {"layers": len(layers), **facts})


def _parts(step: Step) -> tuple[list[dict[str, Tensor]], Tensor | None]:
    """Undo ``_step``."""
    tensors = dict(step.tensors)
    hidden_states = tensors.pop(_HIDDEN, None)
    return by_layer(tensors, step.facts["layers"]), hidden_states


def kept_number(work: Work, name: str, compute: Callable[[], float | None]) -> float | None:
    """A number that takes a forward pass, computed once."""
    number: float | None = work.step(name, lambda: Step(facts={"value": compute()})).facts["value"]
    return number


def named_by_layer(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A vector of each group of each decoder layer, under names for a file."""
    return {
        f"{layer}.{group}": vector
        for layer, vectors in enumerate(layers)
        for group, vector in vectors.items()
    }


def by_layer(tensors: Mapping[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
    """Undo ``named_by_layer`` for so many decoder layers."""
    found: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    for key, tensor in tensors.items():
        layer, _, group = key.partition(".")
        found[int(layer)][group] = tensor
    return found
