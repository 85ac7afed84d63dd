"""Calibration windows that the dense model writes itself (``--dataset self``), kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source, load_model
from permllm_offline.text.sampled_text import sample_text
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shard import Shard

logger = logging.getLogger(__name__)


def own_text(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    sequence_length: int,
    seed: int,
    num_windows: int,
) -> Tensor:
    """Sample windows from a model, or read those that were sampled for the same arguments.

    Sampling needs the whole model in memory.

    Returns:
        int64 [num_windows, sequence_length].

    Raises:
        OfflineError, CheckpointError: the model cannot be loaded.
    """
    digest = hashlib.sha256(f"{dtype} {device} {sequence_length} {seed} {num_windows}".encode())
    for file in sorted(source.directory.glob("*.safetensors")):
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    cached = cache_directory() / f"{digest.hexdigest()[:32]}.safetensors"
    if cached.is_file():
        logger.info("text of %s from %s", source.name, cached)
        return _read(cached)
    model = load_model(source, dtype, device)
    windows = sample_text(model, num_windows, sequence_length, seed)
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    save_file({"windows": windows.contiguous()}, partial)
    partial.replace(cached)
    return windows


def _read(cached: Path) -> Tensor:
    try:
        return Shard(cached).tensor("windows")
    except CheckpointError as error:
        raise OfflineError(
            f"the kept text {cached} is damaged: delete it, and it is sampled again."
        ) from error


def cache_directory() -> Path:
    """Where sampled text is kept: ``permllm/sampled`` in the user's cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "permllm" / "sampled"
