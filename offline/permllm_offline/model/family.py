"""What a model family is: which linears of a decoder layer read one tensor, and where it folds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property

from permllm_offline.model.renaming import stored_part
from permllm_offline.model.row_parts import RowPart


class Fold(Enum):
    """What lies between a shared-input group and the linears whose rows feed it."""

    NONE = "none"
    """What rows cannot be moved through (a norm of the residual stream, a gate, linear attention),
    or a linear that stays as it is: the permutation is applied at run time."""
    ELEMENTWISE = "elementwise"
    """Only elementwise operations: output row j of the preceding linears becomes channel j."""
    VALUE_HEADS = "value heads"
    """Attention: value row (kv head, j) becomes channel (query head, j) of each of its heads."""


@dataclass(frozen=True)
class SharedInputGroup:
    """Linears of one decoder layer that read the same tensor and so share one permutation.

    ``in_every_layer`` is false where layers differ: hybrid models have attention in some, and
    mixtures experts. ``norm`` is the module whose output they read, and nothing else does, where
    that is a norm times its own weight.

    Of an expert, ``experts`` is the module that holds all of a layer, ``reads_whole`` says that its
    linears read what that module reads, and ``share`` which part of these tokens a router hands to
    an expert in the mean.
    """

    name: str
    linears: tuple[str, ...]
    fold: Fold = Fold.NONE
    fold_into: tuple[RowPart, ...] = ()
    in_every_layer: bool = True
    norm: str = ""
    experts: str = ""
    reads_whole: bool = False
    share: float = 1.0

    def at_run_time(self) -> SharedInputGroup:
        """The same linears, the permutation of what they read applied at run time."""
        return replace(self, fold=Fold.NONE, fold_into=())


@dataclass(frozen=True)
class Family:
    """Module names of one architecture; ``linears`` are relative to a decoder layer.

    ``experts`` is the module whose children, by number, are experts of a mixture: their groups are
    among ``groups`` once ``family_of`` knows how many there are; ``expert_linears`` are those of
    one: gate, up, and what reads their products. ``layers`` is the module of the decoder layers in
    the model; checkpoints of more than a language model call it ``stored_layers``. Checkpoints may
    call parts of a layer otherwise: ``renamed`` has pairs of what the model and they call one, as
    Transformers changes it while it loads. Names in ``ignore`` are those of the checkpoint.
    ``recurrent`` is the first linear of the module, of some layers, in which states pass from token
    to token.
    """

    layers: str
    groups: tuple[SharedInputGroup, ...]
    ignore: tuple[str, ...]
    experts: str = ""
    expert_linears: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    renamed: tuple[tuple[str, str], ...] = ()
    stored_layers: str = ""
    recurrent: str = ""

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Every linear that is pruned of one decoder layer or another, in forward order."""
        return tuple(linear for group in self.groups for linear in group.linears)

    def groups_of(self, holds: Callable[[str], bool]) -> list[SharedInputGroup]:
        """List the groups of a decoder layer that ``holds`` some of the linears."""
        return [one for one in self.groups if one.in_every_layer or holds(one.linears[0])]

    @property
    def recurrent_module(self) -> str:
        """The module that ``recurrent`` is in; empty where a family has none."""
        return self.recurrent.rpartition(".")[0]

    @property
    def stack(self) -> str:
        """What the names of all tensors of decoder layers begin with in the checkpoint."""
        return f"{self.stored_layers or self.layers}."

    def layer_name(self, layer: int) -> str:
        """Name of a decoder layer in the checkpoint."""
        return f"{self.stack}{layer}"

    def stored_name(self, layer: int, part: str) -> str:
        """Name in the checkpoint of a module or tensor that a decoder layer calls ``part``."""
        return f"{self.layer_name(layer)}.{stored_part(part, self.renamed)}"
