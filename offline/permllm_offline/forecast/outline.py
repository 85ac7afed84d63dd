"""What a prune would make of a model, linear by linear, told without reading a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from permllm_offline.errors import OfflineError
from permllm_offline.model.prune_plan import PlannedLinear, make_plan
from permllm_offline.model.sparse_bytes import sparse_bytes
from permllm_offline.model.stored import StoredModel, header_bytes
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.pattern import Pattern

RUN_TIME, FOLDED, NONE = "run time", "folded", "none"


@dataclass(frozen=True)
class OutlinedLinear:
    """One linear to prune; ``permutation`` is ``run time``, ``folded`` or ``none``."""

    name: str
    out_features: int
    in_features: int
    permutation: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class Outline:
    """The linears to prune, and what stays dense."""

    model: str
    pattern: str
    block_size: int
    value_dtype: str
    linears: Sequence[OutlinedLinear]
    dense: Mapping[str, int]
    """Bytes of each tensor that is left dense, as it is stored."""
    dense_after: Mapping[str, int]
    """Bytes of each of them in the checkpoint."""
    left_dense: Sequence[str] = ()
    """Names of the linears that are left as they are by choice."""
    beside: Sequence[str] = ()
    """Modules that are no part of the language model, such as a tower for images."""

    @property
    def bytes_before(self) -> int:
        """Bytes of the model's tensors now."""
        return sum(one.bytes_before for one in self.linears) + sum(self.dense.values())

    @property
    def bytes_after(self) -> int:
        """Bytes of the checkpoint's tensors."""
        return sum(one.bytes_after for one in self.linears) + sum(self.dense_after.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary with the totals, for JSON."""
        return asdict(self) | {"bytes_before": self.bytes_before, "bytes_after": self.bytes_after}


def outline(
    stored: StoredModel,
    pattern: Pattern,
    block_size: int,
    value_dtype: str,
    *,
    permuted: bool,
    ignore: Sequence[str] = (),
    dense_dtype: torch.dtype | None = None,
) -> Outline:
    """Tell what a prune would do.

    Args:
        stored: the dense model.
        pattern: N and M.
        block_size: channels per permutation block.
        value_dtype: dtype of the kept values, as checkpoints write it.
        permuted: whether the method permutes channels.
        ignore: as for ``make_plan``.
        dense_dtype: what dense tensors become; None where they stay as they are stored.

    Raises:
        OfflineError: the model is of an unsupported family, the format cannot hold its sizes, its
            tensors are not those of its configuration, or an entry of `ignore` cannot be kept.
    """
    name = stored.source.name
    dtype = stored.source.dtype
    plan = make_plan(
        stored.source, pattern, block_size, permuted=permuted, dtype=dtype, ignore=ignore
    )
    left = dict(stored.tensors)
    linears = []
    for planned in plan.linears:
        before = _weight(stored, planned)
        left.pop(f"{planned.name}.weight")
        after = sparse_bytes(
            planned.out_features,
            planned.layout.in_features,
            pattern,
            value_dtype,
            permuted=planned.permuted,
        )
        linears.append(
            OutlinedLinear(
                planned.name,
                planned.out_features,
                planned.layout.in_features,
                _permutation(planned),
                header_bytes(before),
                after,
            )
        )
    return Outline(
        name,
        str(pattern),
        block_size,
        value_dtype,
        linears,
        {tensor: header_bytes(header) for tensor, header in left.items()},
        {tensor: header_bytes(header, dense_dtype) for tensor, header in left.items()},
        plan.left_dense,
        stored.source.language.beside,
    )


def _weight(stored: StoredModel, planned: PlannedLinear) -> TensorHeader:
    tensor = f"{planned.name}.weight"
    shape = (planned.out_features, planned.layout.in_features)
    header = stored.tensors.get(tensor)
    if header is None or header.shape != shape:
        found = "nothing" if header is None else f"shape {list(header.shape)}"
        raise OfflineError(
            f"{stored.source.name!r} stores {found} as {tensor}, its config.json asks for "
            f"{list(shape)}: fetch the model again."
        )
    return header


def _permutation(planned: PlannedLinear) -> str:
    if not planned.permuted:
        return NONE
    return FOLDED if planned.layout.folded else RUN_TIME
