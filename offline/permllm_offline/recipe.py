"""The recipe: every choice that decides the result, written beside it as ``recipe.yaml``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from permllm_offline.errors import OfflineError
from permllm_offline.methods import BEST, Method, parse_method
from permllm_offline.presets import preset
from permllm_offline.run.scratch import Place
from permllm_offline.text.calibration import Sampling
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import BLOCK_SIZES

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
    window: int = Field(default=2, ge=1)
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
    gradient_checkpointing: Literal["auto", "always", "never"] = "auto"
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
    dataset: str | tuple[str, ...] | None = None
    num_samples: int = Field(default=128, ge=1)
    sampling: Sampling = "stream"
    sequence_length: int = Field(default=512, ge=2)
    evaluation_windows: int = Field(default=8, ge=0)
    seed: int = Field(default=0, ge=0, lt=SEEDS)
    device: str = "cpu"
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    values: Literal["auto", "int8"] = "auto"
    """Dtype of the kept weights in the checkpoint; ``auto``: that of the model."""
    scratch: Place = "memory"
    """Where the states of tuning, and second moments, lie: not part of what is written down."""
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
        return self.model_dump(exclude={"scratch"})


class _Loader(yaml.SafeLoader):
    """Safe YAML without numbers to the base 60: ``2:4`` is a pattern, not 124."""


def _without_base_60(
    resolvers: Mapping[str, Sequence[tuple[str, re.Pattern[str]]]],
) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Resolvers that take nothing with a colon for a number."""
    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return {
        first: [
            (tag, re.compile(rf"(?![^:]*:)(?:{pattern.pattern})", pattern.flags))
            if tag in numbers
            else (tag, pattern)
            for tag, pattern in found
        ]
        for first, found in resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _without_base_60(yaml.SafeLoader.yaml_implicit_resolvers)


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the entries of a recipe file, YAML as ``to_yaml`` writes it or as a person does.

    Raises:
        OfflineError: no readable file, or no mapping in it.
    """
    try:
        entries = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        first = str(error).strip().splitlines()[0]
        raise OfflineError(
            f"cannot read recipe {file}: {first}. Give a YAML file like the recipe.yaml beside a "
            "checkpoint."
        ) from error
    if not isinstance(entries, dict):
        raise OfflineError(
            f"recipe {file} holds {type(entries).__name__}, not a mapping of options. Give a YAML "
            "file like the recipe.yaml beside a checkpoint."
        )
    return entries


def overridden(entries: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with changes on top, the nested ones one by one; a change to None is no change."""
    result = dict(entries)
    for name, value in changes.items():
        nested = result.get(name)
        if isinstance(value, Mapping) and isinstance(nested, Mapping):
            result[name] = overridden(nested, value)
        elif value is not None:
            result[name] = value
    return result


EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "low": {"num_samples": 96, "distillation": {"steps": 150, "self_windows": 32}},
    "default": {"num_samples": 192, "distillation": {"steps": 300, "self_windows": 64}},
    "high": {"num_samples": 768, "distillation": {"steps": 1200, "self_windows": 256}},
}
"""What each effort gives a recipe that distils, wherever the user gives nothing."""


def _said(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def _distils(entries: Mapping[str, Any]) -> bool:
    method = str(entries.get("method") or Recipe.model_fields["method"].default)
    return "distillation" in str(
        entries.get("reconstruction") or parse_method(method).reconstruction
    )


def _option(location: Sequence[str | int]) -> str:
    """The option for an entry of the recipe, or the entry where there is no option."""
    if len(location) > 1 and location[0] != "learning":
        return ".".join(map(str, location))
    name = str(location[-1]).replace("_", "-")
    learns = location[0] == "learning" and name in ("layers", "scope", "window")
    return f"--learn-{name}" if learns else f"--{name}"


def make_recipe(
    entries: Mapping[str, Any],
    effort: str | None = None,
    preset_name: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from user input.

    Args:
        entries: of the recipe; None stands for what comes after them.
        effort: key of ``EFFORTS``, of use to methods that distil: it comes before what is
            recorded. None is the default effort, which comes last.
        preset_name: of ``presets.PRESETS``, where neither entries nor record say anything.
        recorded: entries of a recipe file, where ``entries`` say nothing.

    Raises:
        OfflineError: unknown method, pattern, block size, effort or preset, or a number out of
            range.
    """
    if effort is not None and effort not in EFFORTS:
        raise OfflineError(f"effort {effort!r} is not known: give one of {', '.join(EFFORTS)}.")
    given, recorded = _said(entries), _said(recorded or {})
    if preset_name is not None:
        method = given.get("method") or recorded.get("method")
        recorded = overridden(preset(preset_name, method), recorded)
    entries = overridden(recorded, given)
    if _distils(entries):
        constants = EFFORTS[effort or "default"]
        if effort is None:
            entries = overridden(constants, entries)
        else:
            entries = overridden(overridden(recorded, constants), given)
    try:
        recipe = Recipe.model_validate(entries)
    except ValidationError as error:
        first = error.errors()[0]
        raise OfflineError(
            f"{_option(first['loc'])} {first['input']!r}: {first['msg']}."
        ) from error
    try:
        recipe.parsed_pattern()
    except ValueError as error:
        raise OfflineError(str(error)) from error
    if recipe.block_size not in BLOCK_SIZES:
        raise OfflineError(
            f"block size {recipe.block_size} is not supported: give one of "
            f"{', '.join(map(str, BLOCK_SIZES))}."
        )
    return recipe
