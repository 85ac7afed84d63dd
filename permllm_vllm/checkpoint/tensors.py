"""The tensors of a checkpoint directory by name, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.fused_experts import Part, is_fused, parts_of
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_headers import unscaled_problems
from permllm_vllm.checkpoint.scaled_tensors import ScaledTensors
from permllm_vllm.checkpoint.stored_files import StoredFiles


class StoredTensors:
    """What the safetensors files of a directory hold, whatever it means.

    Fused experts whose names begin with `experts_under` are seen as separate ones, weights of 8
    bits that are stored in a `form` as their products with their scales, of a `dtype`. Raises
    `CheckpointError` for a directory without weights, for files that are not whole, for experts
    that are stored both ways, and for weights of 8 bits without a form, or another one.
    """

    def __init__(
        self,
        directory: str | PathLike[str],
        *,
        experts_under: str | None = None,
        form: ScaledForm | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.directory = Path(directory)
        files = StoredFiles(directory)
        self._files = files if form is None else ScaledTensors(files, form, dtype)
        self._parts: dict[str, Part | None] = dict.fromkeys(self._files.names())
        if experts_under is not None:
            self._separate(name for name in self._parts if name.startswith(experts_under))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def names(self) -> list[str]:
        """List the tensors, layer 2 before layer 10."""
        return natural_order(self._parts)

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor without reading it."""
        part = self._parts.get(name)
        header = self._files.header(name if part is None else part.tensor)
        header = header if part is None else header._replace(shape=part.shape)
        raise_if_any(list(unscaled_problems(name, header)))
        return header

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raises `CheckpointError` when it is not there."""
        part, shape = self._parts.get(name), self.header(name).shape
        return self._files.part(name, 0, shape) if part is None else self._files.part(*part)

    def _separate(self, names: Iterable[str]) -> None:
        """Put the matrices of fused experts in their place."""
        for fused in [name for name in names if is_fused(name)]:
            parts = dict(parts_of(fused, self.header(fused).shape))
            for name in parts:
                if name in self._parts:
                    value, rule = f"also a part of {fused}", "every tensor is stored once"
                    raise Problem(name, value, rule, FETCH_AGAIN).as_error()
            if parts:
                del self._parts[fused]
                self._parts |= parts
