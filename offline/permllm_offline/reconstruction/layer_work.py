"""One decoder layer to reconstruct: what flows into it, and what it should give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from permllm_offline.calibration.calibrated_model import Calibrated, LearningCurve
from permllm_offline.model.decoder_calls import LayerCall, run_layer
from permllm_offline.model.states import States
from permllm_offline.recipe.schema import Recipe
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.sparsity.int4_values import Int4Grid


@dataclass(frozen=True)
class LayerWork:
    """A decoder layer with dense weights, its masks, and its inputs and targets.

    ``inputs`` come from the pruned and reconstructed layers before it, ``targets`` from the dense
    model, [windows, sequence_length, hidden]: both in the model's dtype, on the CPU. ``call`` has
    the other arguments of the layer's call. A reconstruction in steps adds them to
    ``curve``.
    """

    index: int
    layer: nn.Module
    call: LayerCall
    decision: LayerDecision
    inputs: States
    targets: Tensor
    recipe: Recipe
    curve: LearningCurve = field(default_factory=list)

    def forward(self, states: States) -> Tensor:
        """Run the layer as it is: [batch, sequence_length, hidden], differentiable."""
        return run_layer(self.layer, states, self.call).hidden


LayerReconstruction = Callable[[LayerWork], LayerDecision]
"""Updates the kept weights of ``work.layer`` in place and returns the decision.

What the masks prune is zeroed afterwards whatever was written there. The decision is the one that
came, except for a method that chooses its own masks.
"""

ModelReconstruction = Callable[
    [Calibrated, Sequence[LayerDecision], Sequence[Mapping[str, Int4Grid]]], LearningCurve
]
"""Updates the kept weights of the whole pruned model in place and returns its learning curve.

They end on the grids of int4 values, linear -> grid of each decoder layer, where there are any."""


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of a decoder layer's output against the dense model's.

    ``before`` is that of the masks alone, ``after`` that of the reconstructed weights; both have
    the pruned layers before it as input, so they grow with depth. ``curve`` has the steps of a
    reconstruction that takes some.
    """

    name: str
    before: float
    after: float
    curve: LearningCurve = field(default_factory=list)


@dataclass(frozen=True)
class Reconstruction:
    """A kind of reconstruction: of each decoder layer in turn, then of the whole model, or either.

    Of a decoder layer it may ``update`` weights column by column, then ``tune`` them in steps.
    ``model`` reads ``Calibrated.hidden_states``, the dense model's last ones. Masks may be
    ``chosen_masks`` of the update, in place of those of the importances.
    """

    summary: str
    update: LayerReconstruction | None = None
    tune: LayerReconstruction | None = None
    model: ModelReconstruction | None = None
    chosen_masks: bool = False

    @property
    def layer(self) -> LayerReconstruction | None:
        """What is done to each decoder layer, if anything is."""
        update, tune = self.update, self.tune
        if update is None or tune is None:
            return update or tune
        return lambda work: tune(replace(work, decision=update(work)))

    @property
    def updates(self) -> bool:
        """Whether weights of a decoder layer are updated column by column."""
        return self.update is not None

    @property
    def tunes(self) -> bool:
        """Whether weights of a decoder layer are tuned in steps."""
        return self.tune is not None

    @property
    def distils(self) -> bool:
        """Whether it tunes the whole model together."""
        return self.model is not None

    @property
    def needs_windows(self) -> bool:
        """Whether it reads calibration text."""
        return self.updates or self.tunes or self.distils
