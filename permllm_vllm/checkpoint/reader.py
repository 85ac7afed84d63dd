"""Read a checkpoint directory: a sparse one of this format, or a dense one of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import Problem, raise_if_any
from permllm_vllm.checkpoint.headers import (
    TensorHeader,
    inside_modules,
    layer_problems,
    sparse_modules,
)
from permllm_vllm.checkpoint.int4 import stored_values
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import (
    BIAS,
    FOLDED_PERMUTATION,
    INPUT_PERMUTATION,
    WEIGHT_MASK,
    WEIGHT_MULTIPLIER,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    QuantizationConfig,
    is_of_this_format,
)
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.stored_otherwise import require_plain
from permllm_vllm.checkpoint.tensors import StoredTensors

__all__ = ["CheckpointReader", "SparseLayer"]


class CheckpointReader:
    """Lazy view of a checkpoint directory: tensors are read when they are asked for.

    `config` is `config.json`; `quantization` is None for a dense checkpoint. Raises
    `CheckpointError` when the directory is no checkpoint or one of another format.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self.config: dict[str, Any] = read_json(self.directory / CONFIG_NAME)
        self.quantization: QuantizationConfig | None = None
        if is_of_this_format(self.config):
            self.quantization = QuantizationConfig.from_dict(self.config["quantization_config"])
        require_plain(self.config)
        self._tensors = StoredTensors(StoredFiles(self.directory))

    @cached_property
    def _kinds(self) -> dict[str, list[str]]:
        """What follows the name of each sparse module in the names of its tensors."""
        found: dict[str, list[str]] = {module: [] for module in self.sparse_layers()}
        for name in self.names():
            for module, kind in inside_modules(name):
                if module in found:
                    found[module].append(kind)
        return found

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def names(self) -> list[str]:
        """List the tensors as they are stored, layer 2 before layer 10."""
        return self._tensors.names()

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a stored tensor without reading it."""
        return self._tensors.header(name)

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor; raises `CheckpointError` when it is not there."""
        return self._tensors.tensor(name)

    def sparse_layers(self) -> list[str]:
        """List the sparse modules, layer 2 before layer 10; empty for a dense checkpoint."""
        return [] if self.quantization is None else sparse_modules(self.names())

    def layer(self, name: str) -> SparseLayer:
        """Return the tensors of a sparse module, shapes and dtypes checked, contents not yet."""
        if self.quantization is None or f"{name}.{WEIGHT_PACKED}" not in self._tensors:
            value = f"nothing in {self.directory}"
            remedy = "ask for one of `sparse_layers()`"
            raise Problem(
                f"{name}.{WEIGHT_PACKED}", value, "a sparse layer has one", remedy
            ).as_error()
        prefix = f"{name}."
        headers = {kind: self.header(prefix + kind) for kind in self._kinds[name]}
        raise_if_any(layer_problems(name, headers, self.quantization))

        def optional(kind: str) -> Tensor | None:
            return self.tensor(prefix + kind) if kind in headers else None

        multipliers = optional(WEIGHT_MULTIPLIER)
        return SparseLayer(
            values=stored_values(self.tensor(prefix + WEIGHT_PACKED), multipliers),
            mask=self.tensor(prefix + WEIGHT_MASK),
            input_permutation=optional(INPUT_PERMUTATION),
            folded_permutation=optional(FOLDED_PERMUTATION),
            scale=optional(WEIGHT_SCALE),
            bias=optional(BIAS),
            name=name,
            multipliers=multipliers,
        )

    def dense_state_dict(
        self,
        dtype: torch.dtype | None = None,
        wanted: Callable[[str], bool] = lambda name: True,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the model under its Hugging Face names, one tensor in memory at a time.

        Sparse weights come decompressed, run-time permutations undone; folded rows stay where the
        fold put them, which is the same model. `dtype` converts the floating tensors; without it
        each keeps its own (float32 for integers). Tensors whose names are not `wanted` are not
        read. Raises `CheckpointError` on bad contents.
        """
        sparse = set(self.sparse_layers())
        for name in filter(wanted, self.names()):
            module, _, kind = name.rpartition(".")
            if module in sparse and kind not in (WEIGHT_PACKED, BIAS):
                continue
            if module in sparse and kind == WEIGHT_PACKED:
                assert self.quantization is not None
                pattern = Pattern.parse(self.quantization.pattern)
                tensor = self.layer(module).dense(pattern, self.quantization.block_size)
                name = f"{module}.weight"
            else:
                tensor = self.tensor(name)
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            yield name, tensor
