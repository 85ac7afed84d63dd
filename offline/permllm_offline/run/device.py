"""A GPU that a command leaves alone because nobody named a device."""

from __future__ import annotations

import logging

import torch

from permllm_offline.run.processes import first

logger = logging.getLogger(__name__)

DEFAULT_DEVICE = "cpu"


def chosen_device(device: str | None) -> str:
    """The device that is asked for, else the CPU; a GPU that this leaves unused is named."""
    if device is not None:
        return device
    warn_of_unused_gpu()
    return DEFAULT_DEVICE


def warn_of_unused_gpu() -> None:
    """Name a GPU that is there, for work on the CPU that nobody asked for."""
    if torch.cuda.is_available() and first():
        logger.warning(
            "a GPU is here and the CPU computes: --device cuda uses it (not run on one yet); "
            "--device cpu says that it is meant"
        )
