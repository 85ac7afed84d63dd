"""What is measured on the dense model, as steps that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from permllm_offline.activations import DenseStatistics
from permllm_offline.run.steps import Step, Work

_HIDDEN = "hidden_states"


def kept_statistics(work: Work, measure: Callable[[], DenseStatistics]) -> DenseStatistics:
    """Statistics of the dense model, measured once."""

    def compute() -> Step:
        found = measure()
        tensors = {
            f"{layer}.{group}": norm
            for layer, norms in enumerate(found.norms)
            for group, norm in norms.items()
        }
        if found.hidden_states is not None:
            tensors[_HIDDEN] = found.hidden_states
        return Step(tensors, {"layers": len(found.norms)})

    step = work.step("statistics", compute)
    tensors = dict(step.tensors)
    hidden_states = tensors.pop(_HIDDEN, None)
    return DenseStatistics(_by_layer(tensors, step.facts["layers"]), hidden_states)


def kept_number(work: Work, name: str, compute: Callable[[], float | None]) -> float | None:
    """A number that takes a forward pass, computed once."""
    number: float | None = work.step(name, lambda: Step(facts={"value": compute()})).facts["value"]
    return number


def _by_layer(tensors: dict[str, Tensor], layers: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{} for _ in range(layers)]
    for key, tensor in tensors.items():
        layer, _, group = key.partition(".")
        found[int(layer)][group] = tensor
    return found
