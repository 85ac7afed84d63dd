"""Calibration windows that the dense model writes itself (``--dataset self``), kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
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

    Sampling needs the whole model in memory. Windows that cannot be kept are returned all the same,
    with a warning.

    Returns:
        int64 [num_windows, sequence_length].

    Raises:
        OfflineError, CheckpointError: the model cannot be loaded.
    """
    digest = hashlib.sha256(f"{dtype} {device} {sequence_length} {seed} {num_windows}".encode())
    for file in source.weight_files():
        state = file.stat()
        digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
    cached = cache_directory() / f"{digest.hexdigest()[:32]}.safetensors"
    if _is_kept(cached):
        logger.info("text of %s from %s", source.name, cached)
        return _read(cached)
    model = load_model(source, dtype, device)
    windows = sample_text(model, num_windows, sequence_length, seed)
    try:
        _keep(windows, cached)
    except (OSError, SafetensorError) as error:
        logger.warning("the sampled text cannot be kept in %s: %s", cached.parent, error)
    return windows


def _is_kept(cached: Path) -> bool:
    try:
        return cached.is_file()
    except OSError:  # a home that may not be looked into
        return False


def _keep(windows: Tensor, cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file({"windows": windows.contiguous()}, partial)
        partial.replace(cached)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


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
