"""A model pruned under random permutations, baked, and as its dense twin."""

from collections.abc import Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch

from permllm_offline.model.heads import heads_of
from permllm_offline.model.language_model import language_model_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import dtype_name
from permllm_offline.model.lookup import family_of
from permllm_offline.model.modules import decoder_layers, has_module
from permllm_offline.sparsity.bake import apply_masks, bake_layer, divided_norms
from permllm_offline.sparsity.decisions import LayerDecision, decide
from permllm_offline.sparsity.rounded_layer import RoundedLayer, Rounding, choose_grids
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.writer import write_checkpoint


def decisions_of(model: Any, pattern: Pattern, block_size: int) -> list[LayerDecision]:
    """Random permutations: folding must be exact for any, not only for good ones."""
    generator = torch.Generator().manual_seed(5)
    family = family_of(model.config)
    decisions: list[LayerDecision] = []
    for layer in decoder_layers(model, family.layers):
        groups = []
        for group in family.groups_of(partial(has_module, layer)):
            weights = {n: layer.get_submodule(n).weight.detach() for n in group.linears}
            in_features = next(iter(weights.values())).shape[1]
            heads = heads_of(model.config)
            layout = GroupLayout(group, in_features, block_size, heads)
            count = int(layout.ties().max()) + 1
            order = torch.stack(
                [torch.randperm(block_size, generator=generator) for _ in range(count)]
            )
            scores = {n: weight.abs() for n, weight in weights.items()}
            groups.append(decide(layout, scores, layout.expand(order), pattern))
        decisions.append(groups)
    return decisions


def bake(
    model: Any,
    decisions: list[LayerDecision],
    pattern: Pattern,
    block: int,
    at: Path,
    rounded: Sequence[RoundedLayer] = (),
) -> None:
    source = at.with_name(at.name + "-source")
    model.save_pretrained(source)
    family = family_of(model.config)
    folded = {
        family.stored_name(index, linear): group.layout.folded
        for index, decision in enumerate(decisions)
        for group in decision
        for linear in group.masks
    }

    names, of_tensors = list(folded), language_model_of(model.config, ()).names
    tied = model.all_tied_weights_keys  # not in the files that Transformers writes, either
    divided = {
        family.stored_name(index, norm): torch.exp2(-exponents.float())
        for index, grids in enumerate(rounded)
        for norm, exponents in divided_norms(decisions[index], grids).items()
    }

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for own, tensor in model.state_dict().items():
            name = of_tensors.stored(own)
            module = name.rpartition(".")[0]
            if module not in names and own not in tied:
                factors = divided.get(module)
                yield name, tensor if factors is None else (tensor * factors).to(tensor.dtype)
        for index, layer in enumerate(decoder_layers(model, family.layers)):
            grids = rounded[index] if rounded else None
            name = partial(family.stored_name, index)
            yield from bake_layer(name, layer.state_dict(), decisions[index], pattern, grids)

    value_dtype: Any = dtype_name(model.dtype)
    if rounded:
        value_dtype = "int4" if rounded[0].multipliers else "int8"
    config = QuantizationConfig(
        pattern=str(pattern),
        block_size=block,
        value_dtype=value_dtype,
        ignore=list(family.ignore),
        runtime_permuted=[name for name in names if not folded[name]],
        folded=[name for name in names if folded[name]],
        smoothed=any(grids.smoothed for grids in rounded),
    )
    write_checkpoint(at, tensors(), config, source)


def integer_grids(
    model: Any, decisions: list[LayerDecision], values: Rounding = "int8", *, spread: float = 4.0
) -> list[RoundedLayer]:
    """Prune a model and round what is kept, in place; the grids of every layer.

    The inputs are said to differ by so many powers of two, so that smoothing has something to do.
    """
    grids: list[RoundedLayer] = []
    generator = torch.Generator().manual_seed(6)
    layers = decoder_layers(model, family_of(model.config).layers)
    for layer, decision in zip(layers, decisions, strict=True):
        apply_masks(layer, decision)
        energies = {
            group.layout.group.name: torch.exp2(
                2 * spread * torch.randn(group.layout.in_features, generator=generator)
            )
            for group in decision
        }
        grids.append(choose_grids(layer, decision, energies, values, rounds=True, smooths=True))
    return grids


def dense_twin(model: Any, decisions: list[LayerDecision]) -> Any:
    """The masked model in its own channel order, nothing permuted or folded."""
    twin = deepcopy(model)
    layers = decoder_layers(twin, family_of(model.config).layers)
    for layer, decision in zip(layers, decisions, strict=True):
        apply_masks(layer, decision)
    return twin
