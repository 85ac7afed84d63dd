"""The plan of a prune: which linears, which groups, how many bytes; made before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from permllm_offline.errors import OfflineError
from permllm_offline.model.architecture import require_language_model
from permllm_offline.model.family import Family, SharedInputGroup
from permllm_offline.model.heads import heads_of
from permllm_offline.model.ignored_linears import ignored_linears
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import Source
from permllm_offline.model.modules import decoder_layers, has_module, linear_of
from permllm_offline.model.recurrence import kept_bytes
from permllm_offline.model.skeleton import skeleton_of
from permllm_offline.model.sparse_bytes import sparse_bytes
from permllm_vllm.checkpoint.pattern import MASK_BYTE, SUPPORTED, Pattern


@dataclass(frozen=True)
class PlannedLinear:
    """One linear layer of a decoder layer and its bytes, dense and in the checkpoint.

    ``pruned`` is false where it stays dense by choice. ``leads_group`` is true of the first one of
    a shared-input group, which stands for what the group has once. ``kept_beside`` is what a
    recurrence between it and other linears keeps for a backward pass, in bytes for each token,
    beyond what lies between linears elsewhere.
    """

    name: str
    layout: GroupLayout
    out_features: int
    permuted: bool
    dense_bytes: int
    sparse_bytes: int
    pruned: bool = True
    leads_group: bool = False
    kept_beside: float = 0.0

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.out_features * self.layout.in_features

    @property
    def work(self) -> float:
        """How many of them a token meets in the mean: some tokens pass an expert by."""
        return self.weights * self.layout.group.share


@dataclass(frozen=True)
class Plan:
    """What a prune will do to a model."""

    family: Family
    layers: Sequence[Sequence[GroupLayout]]
    """The groups that are pruned of each decoder layer, which may have none."""
    all_by_layer: Sequence[Sequence[PlannedLinear]]
    """The linears of each decoder layer in forward order, those left dense by choice too."""
    hidden_size: int
    """Channels of what passes between decoder layers."""
    total_bytes: int
    """Bytes of the language model in the checkpoint, what is left dense included."""
    ignore: Sequence[str] = ()
    """What stays dense, as entries of the checkpoint's `ignore`."""

    def groups(self, index: int) -> list[SharedInputGroup]:
        """The groups that are pruned of a decoder layer."""
        return [layout.group for layout in self.layers[index]]

    @property
    def every_linear(self) -> list[PlannedLinear]:
        """The linears of all decoder layers, those left dense by choice too."""
        return [linear for linears in self.all_by_layer for linear in linears]

    @property
    def linears(self) -> list[PlannedLinear]:
        """The linears that are pruned."""
        return pruned(self.every_linear)

    @property
    def left_dense(self) -> list[str]:
        """Names of the linears that stay dense by choice."""
        return [linear.name for linear in self.every_linear if not linear.pruned]

    @property
    def pruned_layers(self) -> list[int]:
        """Numbers of the decoder layers of which something is pruned."""
        return [index for index, layouts in enumerate(self.layers) if layouts]


def pruned(linears: Iterable[PlannedLinear]) -> list[PlannedLinear]:
    """Those of some linears that are pruned."""
    return [linear for linear in linears if linear.pruned]


def make_plan(
    source: Source,
    pattern: Pattern,
    block_size: int | None,
    *,
    permuted: bool,
    dtype: torch.dtype,
    values: str = "auto",
    ignore: Sequence[str] = (),
) -> Plan:
    """Plan from the model's configuration alone; no weight is read.

    Args:
        source: the model.
        pattern: N and M.
        block_size: channels per permutation block, or None for one block as wide as the layer.
        permuted: whether the method permutes channels.
        dtype: of the model to be written.
        values: dtype of the kept values as the format calls it, or ``auto`` for `dtype`.
        ignore: entries that name linears which stay dense, beside those of the family.

    Raises:
        OfflineError: unsupported family or head, sizes that the format cannot hold, or entries of
            `ignore` that cannot be kept.
    """
    require_language_model(source)
    family = source.language.family()
    skeleton = skeleton_of(source.config)
    decoder = decoder_layers(skeleton, family.layers)
    groups_by_layer = [family.groups_of(partial(has_module, layer)) for layer in decoder]
    names_by_layer = [
        [
            (group.experts, list(map(partial(family.stored_name, index), group.linears)))
            for group in groups
        ]
        for index, groups in enumerate(groups_by_layer)
    ]
    ignored = ignored_linears(
        ignore,
        [names for layer in names_by_layer for _, names in layer],
        family.ignore,
        [
            [name for experts, names in layer if experts for name in names]
            for layer in names_by_layer
        ],
    )
    layers: list[list[GroupLayout]] = []
    by_layer: list[list[PlannedLinear]] = []
    for index, (layer, groups) in enumerate(zip(decoder, groups_by_layer, strict=True)):
        stored_name, heads = partial(family.stored_name, index), heads_of(source.config)
        layers.append([])
        by_layer.append([])
        for group in groups:
            names = list(map(stored_name, group.linears))
            modules = [linear_of(layer, linear) for linear in group.linears]
            width = modules[0].in_features
            layout = GroupLayout(group, width, block_size or width, heads)
            if not ignored.isdisjoint(stored_name(part.linear) for part in group.fold_into):
                # The rows before it are those of a dense layer, which stays as it was, to the bit;
                # and the plugin takes no folded permutation out of one for an adapter.
                layout = layout.at_run_time()
            if not ignored.isdisjoint(names):
                by_layer[-1] += map(partial(_left_dense, layout, dtype), names, modules)
                continue
            layers[-1].append(layout)
            for name, module in zip(names, modules, strict=True):
                _check_sizes(name, layout, pattern, permuted)
                planned = _plan_linear(name, layout, module, pattern, permuted, dtype, values)
                by_layer[-1].append(replace(planned, leads_group=name == names[0]))
    _count_recurrences(decoder, family, by_layer, dtype)
    everything = _stored_numbers(skeleton) * dtype.itemsize
    saved = sum(one.dense_bytes - one.sparse_bytes for linears in by_layer for one in linears)
    hidden_size = by_layer[0][0].layout.in_features
    return Plan(
        family,
        layers,
        by_layer,
        hidden_size,
        everything - saved,
        [*family.ignore, *ignore],
    )


def between_bytes(linears: Iterable[PlannedLinear], item: int) -> float:
    """What a backward pass keeps for each token, as far as linears tell; ``item`` of a number.

    Each keeps its input, and what lies between two linears is about as much again.
    """
    channels = sum(
        one.layout.group.share * (one.layout.in_features + one.out_features) for one in linears
    )
    return 2 * channels * item


def _count_recurrences(
    decoder: Sequence[nn.Module],
    family: Family,
    by_layer: Sequence[list[PlannedLinear]],
    dtype: torch.dtype,
) -> None:
    """Give the first linear of each recurrent module what that keeps beside linears."""
    beside: float | None = None  # all are of one size
    for index, (layer, linears) in enumerate(zip(decoder, by_layer, strict=True)):
        prefix = family.stored_name(index, f"{family.recurrent_module}.")
        inside = [at for at, one in enumerate(linears) if one.name.startswith(prefix)]
        if not (family.recurrent and inside and has_module(layer, family.recurrent)):
            continue
        first = linears[inside[0]]
        if beside is None:
            module = layer.get_submodule(family.recurrent_module)
            whole = kept_bytes(module, first.layout.in_features, dtype)
            beside = whole - between_bytes([linears[at] for at in inside], dtype.itemsize)
        linears[inside[0]] = replace(first, kept_beside=max(beside, 0.0))


def _stored_numbers(model: nn.Module) -> int:
    """Numbers in a checkpoint of a model: of parameters, tied ones once, and of stored buffers."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    buffers = [one for name, one in model.state_dict().items() if name not in parameters]
    return sum(one.numel() for one in (*model.parameters(), *buffers))


def _check_sizes(name: str, layout: GroupLayout, pattern: Pattern, permuted: bool) -> None:
    if layout.in_features % MASK_BYTE:
        raise OfflineError(
            f"{name} has {layout.in_features} input channels: the format packs masks by 8 channels "
            f"and needs a multiple of 8. Leave it dense: {layout.ignoring()}."
        )
    if layout.in_features % pattern.group:
        fitting = [
            text for text in SUPPORTED if layout.in_features % Pattern.parse(text).group == 0
        ]
        raise OfflineError(
            f"{name} has {layout.in_features} input channels, which is not a multiple of "
            f"{pattern.group}: the pattern {pattern} needs whole groups. Give --pattern "
            f"{' or '.join(fitting)}, or leave it dense: {layout.ignoring()}."
        )
    if permuted:
        layout.check_blocks(name)


def _plan_linear(
    name: str,
    layout: GroupLayout,
    module: nn.Linear,
    pattern: Pattern,
    permuted: bool,
    dtype: torch.dtype,
    values: str,
) -> PlannedLinear:
    value_dtype = str(dtype).removeprefix("torch.") if values == "auto" else values
    shape = module.out_features, layout.in_features
    return PlannedLinear(
        name=name,
        layout=layout,
        out_features=module.out_features,
        permuted=permuted,
        dense_bytes=module.weight.numel() * dtype.itemsize,
        sparse_bytes=sparse_bytes(*shape, pattern, value_dtype, permuted=permuted),
    )


def _left_dense(
    layout: GroupLayout, dtype: torch.dtype, name: str, module: nn.Linear
) -> PlannedLinear:
    size = module.weight.numel() * dtype.itemsize
    return PlannedLinear(name, layout, module.out_features, False, size, size, pruned=False)
