"""Calibration windows that the dense model writes itself (``--dataset self``), kept in a cache."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source, load_model
from permllm_offline.run.local_path import local_path
from permllm_offline.text.sampled_text import sample_text
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shard import Shard

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnText:
    """Text that a model writes, in windows of one length, and where it is kept."""

    source: Source
    dtype: torch.dtype
    device: torch.device
    sequence_length: int
    seed: int

    def windows(self, count: int) -> Tensor:
        """Sample windows from the model, or read those that were sampled before.

        Sampling needs the whole model in memory. Windows that cannot be kept are returned all the
        same, with a warning.

        Returns:
            int64 [count, sequence_length].

        Raises:
            OfflineError, CheckpointError: the model cannot be loaded.
        """
        cached = self._file(count)
        if self.is_kept(count):
            logger.info("text of %s from %s", self.source.name, cached)
            return _read(cached)["windows"]
        model = load_model(self.source, self.dtype, self.device)
        windows = sample_text(model, count, self.sequence_length, self.seed)
        try:
            _keep({"windows": windows.contiguous()}, cached)
        except (OSError, SafetensorError) as error:
            logger.warning("the sampled text cannot be kept in %s: %s", cached.parent, error)
        return windows

    def is_kept(self, count: int) -> bool:
        """Whether so many windows were sampled before."""
        return _is_there(self._file(count))

    def _file(self, count: int) -> Path:
        asked = f"{self.dtype} {self.device} {self.sequence_length} {self.seed} {count}"
        digest = hashlib.sha256(asked.encode())
        for file in self.source.weight_files():
            state = file.stat()
            digest.update(f"{file.resolve()} {state.st_size} {state.st_mtime_ns}".encode())
        return cache_directory() / f"{digest.hexdigest()[:32]}.safetensors"


def _is_there(file: Path) -> bool:
    """Whether a file is there; one in a folder that may not be looked into is not."""
    try:
        return file.is_file()
    except OSError:
        return False


def _keep(tensors: Mapping[str, Tensor], cached: Path) -> None:
    cached.parent.mkdir(parents=True, exist_ok=True)
    partial = cached.with_suffix(f".{os.getpid()}.partial")
    try:
        save_file(dict(tensors), partial)
        partial.replace(cached)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def _read(cached: Path) -> dict[str, Tensor]:
    try:
        shard = Shard(cached)
        return {name: shard.tensor(name) for name in shard.headers}
    except CheckpointError as error:
        raise OfflineError(
            f"the kept text {cached} is damaged: delete it, and it is sampled again."
        ) from error


def cache_directory() -> Path:
    """Where sampled text is kept: ``permllm/sampled`` in the user's cache."""
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "permllm" / "sampled"
