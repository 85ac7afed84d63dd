"""Constants of a recipe as a caller gives them: any of the fields, the others have defaults."""

from __future__ import annotations

from typing import Literal, TypedDict


class LearningEntries(TypedDict, total=False):
    """Fields of ``recipe.schema.LearningRecipe``."""

    layers: str
    scope: Literal["model", "window"]
    window: int
    steps: int
    windows_per_step: int
    learning_rate: float
    weight_decay: float
    initial: Literal["cp", "random"]
    initial_logit: float
    windows_at_once: int
    temperature_start: float
    temperature_end: float
    sinkhorn_iterations: int
    gradient_checkpointing: Literal["auto", "always", "never"]
    validation_windows: int
    validation_interval: int
    patience: int


class BlockwiseEntries(TypedDict, total=False):
    """Fields of ``recipe.schema.BlockwiseRecipe``."""

    steps: int
    windows_per_step: int
    learning_rate: float
    warmup_share: float
    validation_windows: int
    validation_interval: int


class DistillationEntries(TypedDict, total=False):
    """Fields of ``recipe.schema.DistillationRecipe``."""

    steps: int
    windows_per_step: int
    learning_rate: float
    warmup_share: float
    self_windows: int
    layer_windows: int
    validation_windows: int
    validation_interval: int
