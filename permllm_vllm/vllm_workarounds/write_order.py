"""Inductor on CPUs, held to run what reads a tensor after what writes into it.

Where torch fuses loops for a CPU and changes their ranges for that, it forgets that one operation
reads what another writes in place, as vLLM's products of dense layers do: routers of experts then
read logits before they are there.

Upstream: https://github.com/pytorch/pytorch/issues/185509, fixed after 2.13. For torch 2.13.
"""

import functools
from typing import Any

import torch

KEPT = "inductor keeps order"
"""What tells graphs in vLLM's and torch's caches apart from those of before."""


def keep_order() -> None:
    """Have Inductor, in this process, remember what is written in place. Again does nothing.

    As torch does itself since the fix, whose names these are; a torch without them stays as it is.
    """
    from torch._inductor.scheduler import SchedulerNode

    tag = torch.compiler.config.cache_key_tag
    forgetful = getattr(SchedulerNode, "recompute_size_and_body", None)
    if forgetful is None or KEPT in tag:
        return

    @functools.wraps(forgetful)
    def recompute_size_and_body(node: Any, *arguments: Any, **keywords: Any) -> None:
        forgetful(node, *arguments, **keywords)
        node.set_read_writes(node.read_writes.rename(node.mutation_renames))

    SchedulerNode.recompute_size_and_body = recompute_size_and_body  # type: ignore[method-assign, assignment]
    torch.compiler.config.cache_key_tag = f"{tag} {KEPT}".strip()
