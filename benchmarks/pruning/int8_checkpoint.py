"""The checkpoint of int8 values to one of bfloat16 values that was pruned before.

Rounding is the last step of a prune, and its scales follow the inputs of the dense model's layers:
nothing is scored, learned or tuned again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from permllm_offline.conversion.integer_rounding import IntegerRounding
from permllm_offline.model.loading import load_model
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe, read_recipe
from permllm_offline.pruning.in_memory import calibrate, own_text
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report import papers
from permllm_offline.run.steps import Work
from permllm_vllm.checkpoint.packing import unpack
from permllm_vllm.checkpoint.permutation import unpermute_columns
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.writer import write_checkpoint


def write_int8(checkpoint: Path, output: Path) -> None:
    """Write the tensors of `prune --values int8`, without its papers.

    The dense model and the calibration text of the checkpoint's recipe are read again.

    Raises:
        OfflineError, CheckpointError: they, or the checkpoint, cannot be read.
    """
    reader = CheckpointReader(checkpoint)
    assert reader.quantization is not None
    recorded = read_recipe(checkpoint / papers.RECIPE)
    energies = channel_energies(make_recipe({"values": "int8"}, recorded=recorded))
    write_checkpoint(
        output,
        _tensors(reader, reader.quantization.block_size, energies),
        reader.quantization.model_copy(update={"value_dtype": "int8"}),
        checkpoint,
        extra_files=dict.fromkeys(papers.PAPERS),
    )


def channel_energies(recipe: Recipe) -> dict[str, Tensor]:
    """Linear -> float32 [in_features], mean square of its inputs in the dense model.

    Ones where the recipe has no calibration text.
    """
    prepared, work = prepare(recipe), Work()
    model = load_model(prepared.source, prepared.dtype, prepared.device)
    own = own_text(recipe, prepared, model, work)
    energies = calibrate(recipe, prepared, model, own, work).energies
    found: dict[str, Tensor] = {}
    for index, layouts in enumerate(prepared.plan.layers):
        stored_name = partial(prepared.plan.family.stored_name, index)
        for layout in layouts:
            energy = torch.ones(layout.in_features)
            if energies is not None:
                energy = energies[index][layout.group.name]
            found |= dict.fromkeys(map(stored_name, layout.group.linears), energy)
    return found


def _tensors(
    reader: CheckpointReader, block_size: int, energies: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    def judged(module: str, values: Tensor) -> tuple[Tensor, Tensor]:
        layer = reader.layer(module)
        weight = unpack(values, layer.mask)
        for permutation in (layer.input_permutation, layer.folded_permutation):
            if permutation is not None:
                weight = unpermute_columns(weight, permutation, block_size)
        return weight, energies[module]

    return IntegerRounding(judged=judged).rounded(
        (name, reader.tensor(name)) for name in reader.names()
    )
