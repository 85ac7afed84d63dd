"""The options of ``prune`` for the learned permutation."""

from __future__ import annotations

import argparse
from typing import Any

from permllm_offline.recipe.schema import LearningRecipe

_OPTIONS: tuple[tuple[str, str, Any, str, str], ...] = (
    (
        "learn-layers",
        "layers",
        str,
        "all|spread:N|last:N|auto:N|LIST",
        "decoder layers that learn, the others by cp; spread:N are N at equal distances, auto:N "
        "those that lose most when each alone is pruned; LIST: numbers and ranges: 0,3,10-12",
    ),
    (
        "learn-scope",
        "scope",
        str,
        "model|window",
        "end to end, or a few decoder layers at a time, for models whose backward pass does not "
        "fit in memory",
    ),
    ("learn-window", "window", int, "N", "decoder layers at a time with --learn-scope window"),
    ("steps", "steps", int, "N", "learning steps, of each window of layers"),
    ("windows-per-step", "windows_per_step", int, "N", "calibration windows of a step"),
    ("windows-at-once", "windows_at_once", int, "N", "of these held in memory together"),
    ("learning-rate", "learning_rate", float, "X", "of AdamW, at the first step"),
    ("weight-decay", "weight_decay", float, "X", "of AdamW"),
    ("initial", "initial", str, "cp|random", "where learning starts"),
    (
        "initial-logit",
        "initial_logit",
        float,
        "X",
        "head start of the initial permutation, as a logit",
    ),
    ("temperature-start", "temperature_start", float, "X", "of the first step"),
    ("temperature-end", "temperature_end", float, "X", "of the last step"),
    ("sinkhorn-iterations", "sinkhorn_iterations", int, "N", "normalisations of rows and columns"),
    (
        "gradient-checkpointing",
        "gradient_checkpointing",
        str,
        "auto|always|never",
        "compute activations again in the backward pass instead of keeping them; auto: where they "
        "are large",
    ),
    ("validation-windows", "validation_windows", int, "N", "held out to choose the best step"),
    ("validation-interval", "validation_interval", int, "N", "steps between two validations"),
    ("patience", "patience", int, "N", "validations without improvement that end it; 0: never"),
)


def add_learning_options(parser: argparse.ArgumentParser) -> None:
    """Add one option for each constant of ``LearningRecipe``."""
    group = parser.add_argument_group("the learned permutation (permllm-wanda, permllm-ria)")
    for flag, field, kind, metavar, text in _OPTIONS:
        default = LearningRecipe.model_fields[field].default
        group.add_argument(
            f"--{flag}",
            dest=f"learning.{field}",
            type=kind,
            metavar=metavar,
            help=f"{text} (default {default})",
        )


def given_learning(options: argparse.Namespace) -> dict[str, Any]:
    """The constants that the command line gives."""
    values = {field: getattr(options, f"learning.{field}") for _, field, *_ in _OPTIONS}
    return {field: value for field, value in values.items() if value is not None}
