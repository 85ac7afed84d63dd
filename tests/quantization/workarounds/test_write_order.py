"""Inductor remembers what reads a tensor that another operation writes in place."""

from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch._inductor.dependencies import MemoryDep, ReadWrites
from torch._inductor.scheduler import SchedulerNode
from torch.utils._ordered_set import OrderedSet

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.vllm_workarounds.write_order import KEPT, keep_order


class Node(SimpleNamespace):
    """A pointwise operation that reads `buf0`, which `buf1` stands for once it is written into."""

    def __init__(self) -> None:
        super().__init__(read_writes=None, mutation_renames={"buf0": "buf1"})
        self._compute_attrs()

    def _compute_attrs(self, **_: Any) -> None:
        index = sympy.Symbol("i", integer=True)
        read = MemoryDep("buf0", index, (index,), (sympy.Integer(4),))
        self.set_read_writes(ReadWrites(OrderedSet([read]), OrderedSet(), OrderedSet()))

    def set_read_writes(self, read_writes: ReadWrites) -> None:
        self.read_writes = read_writes

    def reads(self) -> list[str]:
        return [dependency.name for dependency in self.read_writes.reads]


def test_torch_still_forgets_it() -> None:
    """Once this fails, torch has the fix: remove `vllm_workarounds/write_order.py`."""
    node, method = Node(), SchedulerNode.recompute_size_and_body
    getattr(method, "__wrapped__", method)(node)
    assert node.reads() == ["buf0"]


def test_what_was_written_is_read_by_its_new_name() -> None:
    keep_order()
    node: Any = Node()
    assert node.reads() == ["buf0"]
    SchedulerNode.recompute_size_and_body(node)
    assert node.reads() == ["buf1"]


def test_twice_is_once() -> None:
    keep_order()
    kept = SchedulerNode.recompute_size_and_body
    keep_order()
    assert SchedulerNode.recompute_size_and_body is kept
    assert torch.compiler.config.cache_key_tag.count(KEPT) == 1
