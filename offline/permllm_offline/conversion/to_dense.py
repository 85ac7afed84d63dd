"""Write a checkpoint of this format as a plain one, in the original order of all channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.conversion.decompression import decompress
from permllm_offline.conversion.report import NONE, UNDONE, ConversionReport, ConvertedLinear
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.memory import converted_shard_bytes
from permllm_offline.model.family import Family, SharedInputGroup
from permllm_offline.model.heads import Heads, heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import Source, dtype_name, open_source
from permllm_offline.model.renaming import own_part, stored_part
from permllm_offline.model.stored import header_bytes
from permllm_offline.model.tokenizer import tokenizer_files
from permllm_offline.report import papers
from permllm_offline.report.model_card import dense_card
from permllm_offline.sparsity.bake import row_permutations
from permllm_offline.sparsity.decisions import GroupDecision
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.folding import unfold_rows
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.packing import unpack
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import unpermute_columns
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import (
    BIAS,
    FOLDED_PERMUTATION,
    WEIGHT_MASK,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    QuantizationConfig,
    value_kinds,
)
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.stored_otherwise import stored_otherwise
from permllm_vllm.checkpoint.writer import write_checkpoint


def convert_to_dense(
    model: str, output: Path, *, force: bool = False, max_shard_bytes: int | None = None
) -> ConversionReport:
    """Write a plain Hugging Face checkpoint with the pruned weights as zeros.

    A model that is quantized otherwise becomes one of 16 bits: see ``decompress``.

    All permutations are undone, folded ones in rows and columns, so every engine and adapter sees
    the channels of the original model. Values stay bit for bit; integers are scaled in float32 and
    rounded to the dtype of the model. One decoder layer is in memory at a time, and one file of
    ``max_shard_bytes``: by default about a decoder layer, 500 MB or more.

    Raises:
        OfflineError: the checkpoint is plain already, or folded where its family cannot fold.
        CheckpointError: it is damaged, or the output cannot be written.
    """
    source = open_source(model)
    if stored_otherwise(read_json(source.directory / CONFIG_NAME)) is not None:
        return decompress(source, output, force=force, max_shard_bytes=max_shard_bytes)
    reader = source.reader()
    if reader.quantization is None:
        raise OfflineError(
            f"{model!r} is dense already: what becomes dense is a permllm checkpoint, or a model "
            "in 8 or 4 bits. Give the output of `permllm-offline prune` or `convert`."
        )
    family = source.language.family()
    _check_modules(reader, family)
    scaled = WEIGHT_SCALE in value_kinds(reader.quantization.value_dtype)
    dtype = source.dtype if scaled else None
    sizes = _dense_sizes(reader, dtype)
    write_checkpoint(
        output,
        _tensors(reader, reader.quantization, family, source.config, dtype),
        None,
        source.directory,
        force=force,
        max_shard_bytes=max_shard_bytes or converted_shard_bytes(sizes, family.stack),
        total_bytes=sum(sizes.values()),
        extra_files={
            **tokenizer_files(source.directory),
            **_papers(source, output.resolve().name),
        },
    )
    quantization = reader.quantization
    permuted = {*quantization.runtime_permuted, *quantization.folded}
    linears = [
        ConvertedLinear(name, UNDONE if name in permuted else NONE, _density(reader, name))
        for name in reader.sparse_layers()
    ]
    return ConversionReport(
        model, "permllm", "dense", quantization.pattern, quantization.block_size, linears
    )


def _tensors(
    reader: CheckpointReader,
    quantization: QuantizationConfig,
    family: Family,
    config: Any,
    dtype: torch.dtype | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense model, one decoder layer in memory at a time."""
    stack = family.stack
    names = reader.names()
    by_layer: dict[int, list[str]] = {}
    for name in names:
        if not name.startswith(stack):
            yield name, reader.tensor(name)
            continue
        number, _, part = name.removeprefix(stack).partition(".")
        by_layer.setdefault(int(number), []).append(own_part(part, family.renamed))
    sparse = set(reader.sparse_layers())
    for index, inside in tqdm(by_layer.items(), desc="write"):
        stored_name = partial(family.stored_name, index)
        layers = {
            linear: reader.layer(stored_name(linear))
            for linear in family.linears
            if stored_name(linear) in sparse
        }
        stored = {
            name: reader.tensor(stored_name(name))
            for name in inside
            if name.rpartition(".")[0] not in layers
        }
        tensors = stored | _original_order(layers, quantization, dtype)
        sizes = {
            linear: len(tensors[f"{linear}.weight"])
            for linear in family.linears
            if f"{linear}.weight" in tensors
        }
        groups = family.groups_of(layers.__contains__)
        folds = _folds(stored_name, layers, sizes, quantization, groups, heads_of(config))
        for linear, (rows, block_size) in folds.items():
            for kind in ("weight", BIAS):
                if (name := f"{linear}.{kind}") in tensors:
                    tensors[name] = unfold_rows(tensors[name], rows, block_size)
        yield from ((stored_name(name), tensor) for name, tensor in tensors.items())


def _original_order(
    layers: Mapping[str, SparseLayer], quantization: QuantizationConfig, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Decompress the linears of a decoder layer; columns in original order, rows as stored."""
    pattern, block_size = Pattern.parse(quantization.pattern), quantization.block_size
    tensors = {}
    for linear, layer in layers.items():
        raise_if_any(layer.content_problems(pattern, block_size))
        weight = unpack(layer.values, layer.mask)
        if layer.scale is not None:
            weight = weight.float() * layer.scale.unsqueeze(1)
        for permutation in (layer.input_permutation, layer.folded_permutation):
            if permutation is not None:
                weight = unpermute_columns(weight, permutation, block_size)
        tensors[f"{linear}.weight"] = weight if dtype is None else weight.to(dtype)
        if layer.bias is not None:
            tensors[f"{linear}.{BIAS}"] = layer.bias
    return tensors


def _folds(
    stored_name: Callable[[str], str],
    layers: Mapping[str, SparseLayer],
    sizes: Mapping[str, int],
    quantization: QuantizationConfig,
    groups: Sequence[SharedInputGroup],
    heads: Heads,
) -> Mapping[str, tuple[Tensor, int]]:
    """Linears of a decoder layer whose rows were moved: their order, one block of all rows."""
    decisions = []
    for group in groups:
        layer = layers.get(group.linears[0])
        if layer is None or layer.folded_permutation is None:
            continue
        permutation = layer.folded_permutation
        layout = GroupLayout(group, layer.in_features, quantization.block_size, heads)
        if not layout.folded or not _agrees(layout, permutation):
            raise Problem(
                stored_name(f"{group.linears[0]}.{FOLDED_PERMUTATION}"),
                "a permutation that cannot have been folded into the preceding layer",
                "blocks stay inside a head, and those that one value head feeds are equal",
                FETCH_AGAIN,
            ).as_error()
        decisions.append(GroupDecision(layout, permutation, {}, {}))
    return row_permutations(decisions, sizes)


def _agrees(layout: GroupLayout, permutation: Tensor) -> bool:
    """Whether blocks that one value head feeds have equal permutations: block-local uint8 [in]."""
    blocks, ties = permutation.reshape(-1, layout.block_size), layout.ties()
    return all(bool((blocks[ties == tie] == blocks[ties == tie][0]).all()) for tie in ties.unique())


def _check_modules(reader: CheckpointReader, family: Family) -> None:
    """Refuse sparse linears of which nobody here knows what feeds them."""
    folding = {linear for group in family.groups if group.fold_into for linear in group.linears}
    assert reader.quantization is not None
    for names, linears, kind in (
        (reader.sparse_layers(), family.linears, WEIGHT_PACKED),
        (reader.quantization.folded, folding, FOLDED_PERMUTATION),
    ):
        known = {stored_part(linear, family.renamed) for linear in linears}
        for name in names:
            _, _, linear = name.removeprefix(family.stack).partition(".")
            if not name.startswith(family.stack) or linear not in known:
                rule = f"the model family has {', '.join(sorted(known))} there"
                remedy = "write the checkpoint again with `permllm-offline prune`"
                raise Problem(f"{name}.{kind}", "an unknown linear", rule, remedy).as_error()


def _papers(source: Source, name: str) -> dict[str, str | None]:
    """What stands beside the weights: nothing that was said of the sparse model."""
    if not (source.directory / papers.REPORT).is_file():
        return {papers.CONVERSION: None}
    left_out = dict.fromkeys([papers.CONVERSION, *papers.PAPERS])
    return {**left_out, papers.CARD: dense_card(source, name)}


def _dense_sizes(reader: CheckpointReader, dtype: torch.dtype | None) -> dict[str, int]:
    """Bytes of every tensor of the dense model by its name."""
    assert reader.quantization is not None
    sizes, values = {}, reader.quantization.value_dtype
    sparse = set(reader.sparse_layers())
    for name in reader.names():
        module, _, kind = name.rpartition(".")
        header = reader.header(name)
        if module not in sparse or kind == BIAS:
            sizes[name] = header_bytes(header)
        elif kind == WEIGHT_MASK:
            rows, octets = header.shape
            written = values if dtype is None else dtype_name(dtype)
            sizes[f"{module}.weight"] = header_bytes(TensorHeader((rows, 8 * octets), written))
    return sizes


def _density(reader: CheckpointReader, name: str) -> float:
    values = reader.layer(name).values
    return int(values.count_nonzero()) / (2 * values.numel())
