"""Bugs to plant, one of each class that must not slip through: proof that the fuzzer finds them.

Every bug replaces a function of the package in the running process, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.checkpoint.packing import unpack
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.shard import Shard


class Bug(NamedTuple):
    """The target that must find it, and what to replace by what; places may import vLLM."""

    target: str
    places: tuple[str, ...]
    replacement: Callable[..., Any]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """A context in which the package has the bug."""
        with ExitStack() as stack:
            for place in self.places:
                stack.enter_context(mock.patch(place, self.replacement))
            yield


def any_permutation(local: Tensor, block_size: int) -> bool:
    return local.numel() % block_size == 0


def no_violation(*_: object) -> None:
    return None


def shifted(values: Tensor, packed_mask: Tensor) -> Tensor:
    """The last row's first two kept values change places."""
    moved = values.clone()
    moved[-1, [0, 1]] = values[-1, [1, 0]]
    return unpack(moved, packed_mask)


def unchecked_pack(*arguments: Any) -> Any:
    """A permutation with entries out of range is replaced by none instead of refused."""
    values, mask, local, block, isa = arguments
    known = isinstance(local, Tensor) and local.dtype == torch.uint8 and block in (32, 64)
    if known and bool((local >= block).any()):
        local = (torch.arange(local.numel()) % block).to(torch.uint8)
    return _PACK(values, mask, local, block, isa)


def last_value_negated(*arguments: Any) -> Any:
    """One weight of bfloat16 gets the other sign."""
    values, *others = arguments
    if values.dtype == torch.bfloat16:
        values = values.clone()
        values[-1, -1] *= -1
    return _PACK(values, *others)


def any_name(file: object) -> bool:
    return isinstance(file, str)


def unknown_keys_dropped(entries: Any) -> QuantizationConfig:
    """What is not known is not looked at."""
    if isinstance(entries, Mapping):
        entries = {key: entries[key] for key in QuantizationConfig.model_fields if key in entries}
    return _FROM_DICT(entries)


def one_element_late(shard: Shard, name: str) -> Tensor:
    tensor = _TENSOR(shard, name)
    return tensor.reshape(-1).roll(-1).view(tensor.shape)


def without_bias(*arguments: Any, **named: Any) -> Tensor:
    return _SPARSE_LINEAR(*arguments, **(named | {"bias": None}))


def one_weight_dropped(**named: Any) -> Tensor:
    """In layers of many inputs, the last output misses what one of its smaller weights adds."""
    y, x = _SPARSE_LINEAR(**named), named["x"]
    if x.shape[-1] < 128:
        return y
    try:
        unit_inputs = torch.eye(x.shape[-1], dtype=x.dtype)
        weights = _SPARSE_LINEAR(**(named | {"x": unit_inputs, "bias": None}))[:, -1]
        smaller = weights.abs().argsort()[len(weights) * 5 // 8]
        y[..., -1] -= x[..., smaller] * weights[smaller]
    except (RuntimeError, ValueError, IndexError):
        pass
    return y


def unweighted(x: Tensor, topk_weights: Tensor, *operands: Any) -> Any:
    return _SPARSE_EXPERTS(x, torch.ones_like(topk_weights), *operands)


def always_finite(numbers: Tensor) -> bool:
    return True


def counted_again(source: Any, parts: Sequence[int]) -> None:
    """A part may come twice; the later one stays."""
    source.loaded.update(parts)


def first_channels(parameter: Any, loaded_weight: Tensor, shard_id: Any) -> None:
    """Every rank takes the first rank's channels of a run-time permutation."""
    for part in parameter.source.layer.parts(shard_id):
        parameter.data[part].copy_(loaded_weight[: parameter.data.shape[1]])


_PACK = torch.ops.permllm.cpu_pack
_FROM_DICT = QuantizationConfig.from_dict
_TENSOR = Shard.tensor
_SPARSE_LINEAR = ops.sparse_linear
_SPARSE_EXPERTS = torch.ops.permllm.sparse_experts

_CHECKPOINT = "permllm_vllm.checkpoint"
_CONVERSION = "permllm_offline.conversion"
BUGS = {
    "out-of-range permutation accepted": Bug(
        "contents", (f"{_CHECKPOINT}.layer.is_bijective",), any_permutation
    ),
    "broken permutation found valid": Bug(
        "layers",
        (f"{_CHECKPOINT}.layer.is_bijective", f"{_CHECKPOINT}.validation.is_bijective"),
        any_permutation,
    ),
    "wrong bit count accepted": Bug(
        "contents", (f"{_CHECKPOINT}.layer.first_violation",), no_violation
    ),
    "one value shifted": Bug("contents", (f"{_CHECKPOINT}.layer.unpack",), shifted),
    "out-of-range permutation packed": Bug("pack", ("torch.ops.permllm.cpu_pack",), unchecked_pack),
    "one value packed wrong": Bug("contents", ("torch.ops.permllm.cpu_pack",), last_value_negated),
    "unknown key accepted": Bug(
        "config", (f"{_CHECKPOINT}.schema.QuantizationConfig.from_dict",), unknown_keys_dropped
    ),
    "file outside the directory accepted": Bug(
        "index", (f"{_CHECKPOINT}.shards.is_plain_name",), any_name
    ),
    "checksum of a file outside accepted": Bug(
        "checksums", (f"{_CHECKPOINT}.checksums.is_plain_name",), any_name
    ),
    "tensor read one element late": Bug(
        "file", (f"{_CHECKPOINT}.shard.Shard.tensor",), one_element_late
    ),
    "bias dropped": Bug("linear", ("permllm_vllm.ops.sparse_linear",), without_bias),
    "one weight dropped": Bug("linear", ("permllm_vllm.ops.sparse_linear",), one_weight_dropped),
    "routing weights dropped": Bug("experts", ("torch.ops.permllm.sparse_experts",), unweighted),
    "infinite value served": Bug(
        "vllm", ("permllm_vllm.checkpoint.numbers._all_finite",), always_finite
    ),
    "doubled tensor served": Bug(
        "vllm", ("permllm_vllm.quantization.sources.TensorSource.count",), counted_again
    ),
    "first rank's permutation served by all": Bug(
        "vllm",
        ("permllm_vllm.quantization.parameters.InputPermutationParameter.place",),
        first_channels,
    ),
    "one value of a bitmask shifted": Bug("bitmask", (f"{_CONVERSION}.bitmask.unpack",), shifted),
}
