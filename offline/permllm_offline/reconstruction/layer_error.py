"""How far a decoder layer of the pruned model is from the dense one, before and after."""

from __future__ import annotations

from dataclasses import dataclass, field

from permllm_offline.calibration.calibrated_model import LearningCurve


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
