"""What text said of the decoder layers that it has passed: a run that was cut off goes on there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from permllm_offline.calibration.unreached_experts import Unreached
from permllm_offline.run.steps import Step
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_offline.sparsity.stored_grids import grid_tensors, grids_of

_NORM = "norm:"


@dataclass
class CalibratedLayers:
    """Grids of the first decoder layers, in order.

    ``norms`` are divided, by the name of their module: int8 exponents [channels].
    """

    rounded: list[RoundedLayer] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)
    unreached: list[Unreached] = field(default_factory=list)

    def add(self, rounded: RoundedLayer, norms: Mapping[str, Tensor], unreached: Unreached) -> None:
        """Append the next decoder layer."""
        self.rounded.append(rounded)
        self.norms |= norms
        self.unreached.append(unreached)

    def step(self) -> Step:
        """The same as a step that can be kept."""
        # The exponents of grids themselves, and a file takes no tensors that share memory.
        norms = {f"{_NORM}{name}": exponents.clone() for name, exponents in self.norms.items()}
        facts = {
            "errors": [dict(layer.errors) for layer in self.rounded],
            "unreached": [list(layer) for layer in self.unreached],
        }
        return Step(grid_tensors(self.rounded) | norms, facts)

    @classmethod
    def of(cls, step: Step) -> CalibratedLayers:
        """Read what ``step`` gave; states of the text may be among it."""
        norms = {
            name.removeprefix(_NORM): step.tensors[name]
            for name in step.tensors
            if name.startswith(_NORM)
        }
        unreached = [Unreached(*layer) for layer in step.facts["unreached"]]
        return cls(grids_of(step.tensors, step.facts["errors"]), norms, unreached)
