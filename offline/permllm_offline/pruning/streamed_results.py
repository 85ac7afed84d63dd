"""What the decoder layers gave that are pruned already, so that a resumed run passes none again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field

from permllm_offline.calibration.unreached_experts import Unreached
from permllm_offline.pruning.layerwise import PASSES, layer_step_name
from permllm_offline.pruning.streamed_windows import Flow, load_states, with_states
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.run.steps import Step, Work
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_offline.sparsity.stored_grids import grid_tensors, grids_of


@dataclass
class PassedLayers:
    """Results of the first ``count`` decoder layers, in order.

    ``errors`` are there where layers are reconstructed, ``outputs`` (relative errors) and the two
    perplexities where windows are held out, ``rounded`` where values are integers, ``unpermuted``
    once the layer is passed that the report shows, and ``unreached`` where calibration text runs.
    """

    count: int = 0
    errors: list[LayerError] = field(default_factory=list)
    outputs: list[float] = field(default_factory=list)
    unpermuted: list[str] = field(default_factory=list)
    rounded: list[RoundedLayer] = field(default_factory=list)
    dense_perplexity: float | None = None
    sparse_perplexity: float | None = None
    unreached: list[Unreached] = field(default_factory=list)

    def step(self) -> Step:
        """The results as a step that can be kept."""
        facts = asdict(self) | {
            "errors": [astuple(error) for error in self.errors],
            "rounded": [dict(layer.errors) for layer in self.rounded],
            "unreached": [list(layer) for layer in self.unreached],
        }
        return Step(grid_tensors(self.rounded), facts)

    @classmethod
    def of(cls, step: Step) -> PassedLayers:
        """Read what ``step`` gave."""
        found = cls(**step.facts)
        found.errors = [LayerError(*error) for error in step.facts["errors"]]
        found.unreached = [Unreached(*layer) for layer in found.unreached]
        found.rounded = grids_of(step.tensors, step.facts["rounded"])
        return found


def keep_passed(work: Work, passed: PassedLayers, flows: Mapping[str, Flow]) -> None:
    """Keep results and hidden states until the next decoder layer is passed."""
    work.keep_interval(PASSES, with_states(passed.step(), flows))


def go_on(work: Work, flows: Mapping[str, Flow]) -> PassedLayers:
    """Put kept hidden states into the flows, and return the results that belong to them.

    Without them, or where the pruned weights of a passed layer are not kept, nothing is passed.
    """
    kept = work.interval(PASSES)
    if kept is None:
        return PassedLayers()
    passed = PassedLayers.of(kept)
    if not all(work.finished(layer_step_name(index)) for index in range(passed.count)):
        return PassedLayers()
    load_states(kept, flows)
    return passed
