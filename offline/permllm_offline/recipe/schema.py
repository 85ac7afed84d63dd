"""The recipe: every choice that decides the result, written beside it as ``recipe.yaml``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from permllm_offline.model.recomputation import Checkpointing
from permllm_offline.recipe.methods import BEST, Method, parse_method
from permllm_offline.text.row_text import TEXT_FIELD
from permllm_offline.text.windows import Sampling
from permllm_vllm.checkpoint.pattern import Pattern

SEEDS = 1 << 32
"""One more than the largest: what is added to a seed stays far below what torch takes."""


class LearningRecipe(BaseModel):
    """Constants of the learned permutation; the defaults suit minutes on a CPU.

    Learning starts from the heuristic reallocation (``initial``: ``cp``, or ``random``) with
    ``initial_logit`` in its favour, and with a learning rate far above the paper's 1e-3: tens of
    steps do what takes the paper hundreds. A backward pass holds ``windows_at_once`` of the
    ``windows_per_step`` in memory, and with ``gradient_checkpointing`` only what passes between
    decoder layers. The decoder ``layers`` learn end to end (``scope``: ``model``), or ``window``
    layers at a time, ``steps`` steps for each. Learning ends after ``patience`` validations
    without improvement; 0 never ends it early.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str = "all"
    scope: Literal["model", "window"] = "model"
    window: int = Field(default=1, ge=1)
    steps: int = Field(default=100, ge=1)
    windows_per_step: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    initial: Literal["cp", "random"] = "cp"
    initial_logit: float = Field(default=0.5, gt=0)
    windows_at_once: int = Field(default=2, ge=1)
    temperature_start: float = Field(default=1.0, gt=0)
    temperature_end: float = Field(default=0.1, gt=0)
    sinkhorn_iterations: int = Field(default=5, ge=0)
    gradient_checkpointing: Checkpointing = "auto"
    validation_windows: int = Field(default=4, ge=1)
    validation_interval: int = Field(default=10, ge=1)
    patience: int = Field(default=0, ge=0)


class DistillationRecipe(BaseModel):
    """Constants of the distillation of kept weights; see also ``EFFORTS``.

    ``self_windows`` windows that the dense model writes itself join those of the data set, so that
    the pruned model stays close to it on other text too. Layer-wise updates before the
    distillation, where there are any, read ``layer_windows`` of all. Several processes take one
    window each in a step where ``windows_per_step`` is not given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=300, ge=1)
    windows_per_step: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_share: float = Field(default=0.05, ge=0, le=1)
    self_windows: int = Field(default=64, ge=0)
    layer_windows: int = Field(default=64, ge=1)
    validation_windows: int = Field(default=4, ge=1)
    validation_interval: int = Field(default=50, ge=1)


class BlockwiseRecipe(BaseModel):
    """Constants of the tuning of kept weights, one decoder layer at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(default=48, ge=1)
    windows_per_step: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup_share: float = Field(default=0.1, ge=0, le=1)
    validation_windows: int = Field(default=4, ge=1)
    validation_interval: int = Field(default=12, ge=1)


class Recipe(BaseModel):
    """Every choice of one ``prune`` run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    method: str = BEST
    reconstruction: str | None = None
    """Kind of reconstruction in place of the method's own."""
    pattern: str = "2:4"
    block_size: int = 64
    ignore: tuple[str, ...] = ()
    """Linears that stay dense, as entries of the checkpoint's `ignore`."""
    dataset: str | tuple[str, ...] | None = None
    text_field: str = Field(default=TEXT_FIELD, min_length=1)
    """Field of a row that holds the text, or messages for the chat template of the model."""
    num_samples: int = Field(default=128, ge=1)
    sampling: Sampling = "stream"
    sequence_length: int = Field(default=512, ge=2)
    evaluation_windows: int = Field(default=8, ge=0)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    device: str = "cpu"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    values: Literal["auto", "int8", "int4"] = "auto"
    """Dtype of the kept weights; ``auto``: that of the model."""
    smoothing: bool = True
    """Whether integer values meet inputs that are evened out where something can divide them."""
    learning: LearningRecipe = LearningRecipe()
    blockwise: BlockwiseRecipe = BlockwiseRecipe()
    distillation: DistillationRecipe = DistillationRecipe()

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets, none or one or several."""
        if self.dataset is None:
            return ()
        return (self.dataset,) if isinstance(self.dataset, str) else self.dataset

    def parsed_method(self) -> Method:
        """The parts of the method, with this recipe's own reconstruction."""
        method = parse_method(self.method)
        if self.reconstruction is None:
            return method
        return replace(method, reconstruction=self.reconstruction)

    def parsed_pattern(self) -> Pattern:
        """The pattern as numbers."""
        return Pattern.parse(self.pattern)

    def to_yaml(self) -> str:
        """Text of ``recipe.yaml``: what decides the result."""
        return yaml.safe_dump(self.choices(), sort_keys=False)

    def choices(self) -> dict[str, Any]:
        """What decides the result, as JSON can hold it."""
        return self.model_dump()
