"""Takes folded permutations out of a model again, for LoRA adapters.

An adapter was trained in the model's own channel order. Folding moved the rows of one layer (`v`,
or `gate` and `up`) so that the next (`o`, or `down`) finds its input permuted. Here those rows move
back, and the permutation of the next layer becomes a run-time one, as if it had never been folded.
"""

from typing import Any

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.permutation import absolute, inverse
from permllm_vllm.compat import QKVParallelLinear


class Unfolding:
    """The linear layers of a model by the module that holds them, and which are folded.

    The format names the folded layer, not the one whose rows moved: that is the only other linear
    layer of the same module (`self_attn.qkv_proj` beside `self_attn.o_proj`). vLLM processes the
    two in the order in which the module has them, either of which comes first.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._folded: dict[str, dict[str, Any]] = {}
        self._preceding: dict[str, dict[str, bool]] = {}
        self._kept: dict[str, Tensor] = {}
        self._moved_back: set[str] = set()

    def add(self, prefix: str, layer: Any, *, folded: bool, sparse: bool) -> None:
        """Remember a linear layer that vLLM builds, sparse or dense."""
        parent = _parent(prefix)
        if folded:
            self._folded.setdefault(parent, {})[prefix] = layer
        else:
            self._preceding.setdefault(parent, {})[prefix] = sparse

    def row_order(self, prefix: str, layer: Any, output_sizes: list[int]) -> Tensor | None:
        """Order that brings this rank's rows of a loaded layer back: `new = old[order]`, int64.

        None for a layer whose rows never moved.

        Raises:
            CheckpointError: the query heads of a KV head are permuted differently.
            NotImplementedError: it is not certain what was folded into which layer.
        """
        parent = _parent(prefix)
        if parent not in self._folded or prefix in self._folded[parent]:
            return None
        ((name, folded), *_) = self._folded[parent].items()
        self._require_one(parent, name)
        permutation = self._kept.pop(parent, None)
        if permutation is None:
            parameter = getattr(folded, "folded_permutation", None)
            if parameter is None:
                raise _refusal(name, "it was not loaded together with the layer before it")
            parameter.source.require_complete()
            permutation = parameter.shared()
            self._moved_back.add(parent)
        if isinstance(layer, QKVParallelLinear):
            kept, rows = output_sizes[:2], self._value_rows(permutation, layer, name)
        else:
            kept, rows = [], permutation.repeat(len(output_sizes))
        # Of three parts, the last alone would be `v`.
        if len(output_sizes) > len(kept) + 2 or sum(kept) + rows.numel() != sum(output_sizes):
            raise _refusal(name, f"{prefix} has {sum(output_sizes)} rows, not as many as it reads")
        start = sum(kept)
        order = absolute(inverse(rows, self._block_size), self._block_size) + start
        return torch.cat([torch.arange(start, device=order.device), order])

    def keep(self, prefix: str, permutation: Tensor) -> None:
        """Remember the permutation of a loaded folded layer, if its rows have yet to move back.

        Raises:
            NotImplementedError: they never will.
        """
        parent = _parent(prefix)
        self._require_one(parent, prefix)
        if parent in self._moved_back:
            self._moved_back.remove(parent)
        else:
            self._kept[parent] = permutation.clone()

    def _require_one(self, parent: str, name: str) -> None:
        """Raise NotImplementedError unless a module has one folded layer and one before it."""
        preceding = self._preceding.get(parent, {})
        if len(self._folded[parent]) > 1 or len(preceding) > 1:
            raise _refusal(name, f"several layers of {parent} could hold its channels")
        if not preceding or not all(preceding.values()):
            raise _refusal(name, "the layer before it is left dense (`ignore`)")

    def _value_rows(self, permutation: Tensor, layer: Any, name: str) -> Tensor:
        """Block-local permutation of the rows of `v` on this rank, from that of `o`'s input."""
        heads = permutation.view(layer.num_kv_heads, -1, layer.v_head_size)
        first = heads[:, :1]
        if layer.v_head_size % self._block_size or not torch.equal(heads, first.expand_as(heads)):
            raise CheckpointError(
                f"{name}.folded_permutation differs between query heads that read one KV head, or "
                f"its blocks of {self._block_size} do not fit heads of {layer.v_head_size}, so it "
                "cannot have been folded into `v`. The checkpoint is damaged: copy it again, or "
                "run `permllm-offline prune` again."
            )
        return first.flatten()


def _parent(prefix: str) -> str:
    return prefix.rpartition(".")[0]


def _refusal(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"LoRA was enabled, but {name} has a folded permutation that cannot be taken out again: "
        f"{reason}. Its channels are stored in another order than an adapter's. Serve without "
        "--enable-lora, or merge the adapter into the dense model before pruning."
    )
