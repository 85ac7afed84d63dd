"""Bugs to plant, one of each class that must not slip through: proof that the fuzzer finds them.

Every bug replaces a function of the package in the running process, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from permllm_offline.conversion import bitmask, recovery
from permllm_vllm.checkpoint import checksums, layer, shards, validation
from permllm_vllm.checkpoint.packing import unpack


class Bug(NamedTuple):
    """The target that must find it, and what to replace by what."""

    target: str
    places: tuple[tuple[Any, str], ...]
    replacement: Callable[..., Any]

    @contextmanager
    def planted(self) -> Iterator[None]:
        """A context in which the package has the bug."""
        with ExitStack() as stack:
            for owner, name in self.places:
                stack.enter_context(mock.patch.object(owner, name, self.replacement))
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


def any_name(file: object) -> bool:
    return isinstance(file, str)


def rolled(local: Tensor, *_: object) -> Tensor:
    """Every channel takes the place of the next one."""
    return local.roll(1)


_PACK = torch.ops.permllm.cpu_pack

BUGS = {
    "out-of-range permutation accepted": Bug(
        "contents", ((layer, "is_bijective"),), any_permutation
    ),
    "broken permutation found valid": Bug(
        "layers", ((layer, "is_bijective"), (validation, "is_bijective")), any_permutation
    ),
    "wrong bit count accepted": Bug("contents", ((layer, "first_violation"),), no_violation),
    "one value shifted": Bug("contents", ((layer, "unpack"),), shifted),
    "out-of-range permutation packed": Bug(
        "pack", ((torch.ops.permllm, "cpu_pack"),), unchecked_pack
    ),
    "file outside the directory accepted": Bug("index", ((shards, "is_plain_name"),), any_name),
    "checksum of a file outside accepted": Bug(
        "checksums", ((checksums, "is_plain_name"),), any_name
    ),
    "one value of a bitmask shifted": Bug("bitmask", ((bitmask, "unpack"),), shifted),
    "recovered order misplaced": Bug("recovery", ((recovery, "canonical"),), rolled),
}
