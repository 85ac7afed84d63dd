"""The report of a prune, ``report.json``: everything that the recipe, model and data decide."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from permllm_offline.calibration.calibrated_model import LearnedPermutations
from permllm_offline.model.prune_plan import Plan
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.report.mask_example import MaskExample, example_layer, mask_example
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision
from permllm_offline.text.windows import CalibrationWindows
from permllm_vllm.checkpoint.schema import installed_version


@dataclass(frozen=True)
class LayerReport:
    """What happened to one linear layer.

    ``permutation`` is ``none``, ``run time`` or ``folded``; ``moved_channels`` and
    ``retained_importance`` (of removal's damage, where the reconstruction chooses masks) are
    shares, 0..1; ``rounding_error`` is the expected error of the output that int8 or int4 values
    cause, relative to it, or None. Where weights are tuned on the grids of int4 it is that before.
    """

    name: str
    out_features: int
    in_features: int
    permutation: str
    moved_channels: float
    retained_importance: float
    dense_bytes: int
    sparse_bytes: int
    rounding_error: float | None = None


@dataclass(frozen=True)
class CalibrationRecord:
    """The windows of a data set: to calibrate on, held out, and the SHA-256 of all their tokens.

    ``own_windows`` are those that the dense model wrote itself, with a digest of their own. Equal
    digests are equal tokens in equal order; a text that changed under its name gives another.
    """

    windows: int
    held_out: int
    tokens_sha256: str
    own_windows: int = 0
    own_tokens_sha256: str | None = None

    @classmethod
    def of(cls, windows: CalibrationWindows, own: Tensor | None = None) -> CalibrationRecord:
        """Describe the windows of a data set, and those that the model wrote."""
        return cls(
            len(windows.calibration),
            len(windows.held_out),
            _digest(windows.calibration, windows.held_out),
            0 if own is None else len(own),
            None if own is None else _digest(own),
        )


def _digest(*parts: Tensor) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Report:
    """What a prune did.

    Perplexities, and ``output_errors`` of each decoder layer, are over windows that calibration
    never saw; None, and empty, without such windows. ``masked_errors`` are what the latter were
    before all kept weights were tuned together, ``reallocated_errors`` what they are with the
    heuristic reallocation in place of learned permutations; empty where there is no such step.
    """

    recipe: Recipe
    tool_version: str
    perplexity_before: float | None
    perplexity_after: float | None
    learning_curve: Sequence[dict[str, float]]
    reconstruction: Sequence[LayerError]
    reconstruction_curve: Sequence[dict[str, float]]
    layers: Sequence[LayerReport]
    output_errors: Sequence[float] = ()
    mask_example: MaskExample | None = None
    learned_layers: Sequence[int] = ()
    """Decoder layers that learned their permutations; the others have the reallocation."""
    sensitivities: Sequence[float] | None = None
    """Of each decoder layer, where they chose ``learned_layers``."""
    calibration: CalibrationRecord | None = None
    masked_errors: Sequence[float] = ()
    reallocated_errors: Sequence[float] = ()
    left_dense: Sequence[str] = ()
    """Names of the linears that the recipe's ``ignore`` leaves dense."""
    model_commit: str | None = None
    """Commit of the dense model, where it is one of the hub."""

    @property
    def rounding_measure(self) -> str:
        """What the layers' ``rounding_error`` is, in words."""
        tuned = self.recipe.values == "int4" and parts_of(self.recipe).reconstruction.distils
        return f"expected error of a layer's output{' before tuning' if tuned else ''}"

    @classmethod
    def build(
        cls,
        recipe: Recipe,
        plan: Plan,
        decisions: Sequence[LayerDecision],
        learned: LearnedPermutations | None,
        perplexity_before: float | None,
        perplexity_after: float | None,
        reconstruction: Sequence[LayerError] = (),
        reconstruction_curve: Sequence[dict[str, float]] = (),
        rounding_errors: Sequence[Mapping[str, float]] = (),
        output_errors: Sequence[float] = (),
        unpermuted: Sequence[str] = (),
        masked_errors: Sequence[float] = (),
        reallocated_errors: Sequence[float] = (),
    ) -> Report:
        """Collect the report from the plan and the decisions; one layer is shown with its masks."""
        groups = [
            (group, linear)
            for layer in decisions
            for group in layer
            for linear in group.layout.group.linears
        ]
        rounding: list[float | None] = [None] * len(groups)
        if rounding_errors:
            rounding = [layer[linear] for layer in rounding_errors for linear in layer]
        layers = [
            LayerReport(
                name=planned.name,
                out_features=planned.out_features,
                in_features=group.layout.in_features,
                permutation=permutation_state(group),
                moved_channels=_moved(group),
                retained_importance=group.retained[linear],
                dense_bytes=planned.dense_bytes,
                sparse_bytes=planned.sparse_bytes,
                rounding_error=error,
            )
            for planned, (group, linear), error in zip(plan.linears, groups, rounding, strict=True)
        ]
        shown = example_layer(decisions)
        return cls(
            recipe,
            installed_version(),
            perplexity_before,
            perplexity_after,
            [] if learned is None else learned.curve,
            reconstruction,
            reconstruction_curve,
            layers,
            output_errors,
            mask_example(partial(plan.family.stored_name, shown), decisions[shown], unpermuted),
            [] if learned is None else list(learned.layers),
            None if learned is None else learned.sensitivities,
            masked_errors=masked_errors,
            reallocated_errors=reallocated_errors,
            left_dense=plan.left_dense,
        )

    @property
    def byte_ratio(self) -> float:
        """Sparse over dense bytes of the pruned linears."""
        return sum(r.sparse_bytes for r in self.layers) / sum(r.dense_bytes for r in self.layers)

    def to_json(self) -> str:
        """Text of ``report.json``; a number that is not finite, which JSON has not, is null."""
        entries: dict[str, Any] = {
            "tool_version": self.tool_version,
            "perplexity_before": self.perplexity_before,
            "perplexity_after": self.perplexity_after,
            "byte_ratio": self.byte_ratio,
            "recipe": self.recipe.choices(),
            "model_commit": self.model_commit,
            "calibration": None if self.calibration is None else asdict(self.calibration),
            "learning_curve": list(self.learning_curve),
            "learned_layers": list(self.learned_layers),
            "sensitivities": self.sensitivities,
            "reconstruction": [asdict(error) for error in self.reconstruction],
            "reconstruction_curve": list(self.reconstruction_curve),
            "reallocated_errors": list(self.reallocated_errors),
            "masked_errors": list(self.masked_errors),
            "output_errors": list(self.output_errors),
            "mask_example": None if self.mask_example is None else asdict(self.mask_example),
            "layers": [asdict(layer) for layer in self.layers],
            "left_dense": list(self.left_dense),
        }
        return json.dumps(_finite(entries), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def permutation_state(group: GroupDecision) -> str:
    """Say where the permutation of a group is applied: ``none``, ``run time`` or ``folded``."""
    if group.permutation is None:
        return "none"
    return "folded" if group.layout.folded else "run time"


def _moved(group: GroupDecision) -> float:
    if group.permutation is None:
        return 0.0
    block_size = group.layout.block_size
    still = torch.arange(group.layout.in_features) % block_size
    return float(torch.mean((group.permutation != still).float()))
