"""What is measured on the dense model, as steps that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from permllm_offline.calibration.statistics import DenseStatistics
from permllm_offline.run.steps import Step, Work

_HIDDEN, _STATISTICS = "hidden_states", "statistics"


def kept_statistics(work: Work, measure: Callable[[], DenseStatistics]) -> DenseStatistics:
    """Statistics of the dense model, measured once."""

    def compute() -> Step:
        found = measure()
        tensors = named_by_layer(found.norms)
        if found.hidden_states is not None:
            tensors[_HIDDEN] = found.hidden_states
        return Step(tensors, {"layers": len(found.norms)})

    step = work.step(_STATISTICS, compute)
    tensors = dict(step.tensors)
    hidden_states = tensors.pop(_HIDDEN, None)
    return DenseStatistics(by_layer(tensors, step.facts["layers"]), hidden_states)


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
