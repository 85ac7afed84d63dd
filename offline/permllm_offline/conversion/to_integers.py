"""Write a checkpoint of this format again, its values rounded to int8 or int4."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from permllm_offline.conversion.calibrated_rounding import CalibratedRounding
from permllm_offline.conversion.calibration_text import (
    CalibrationText,
    check_groups,
    kept_calibration,
)
from permllm_offline.conversion.integer_rounding import IntegerRounding
from permllm_offline.conversion.report import (
    FOLDED,
    NONE,
    RUN_TIME,
    ConversionReport,
    ConvertedLinear,
    FinishedRounding,
)
from permllm_offline.conversion.rounding_notice import noted_papers
from permllm_offline.conversion.sparse_model import SparseModel, served_model
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.memory import converted_shard_bytes
from permllm_offline.model.loading import Source
from permllm_offline.model.sparse_bytes import tensor_bytes
from permllm_offline.model.stored import header_bytes
from permllm_offline.model.tokenizer import tokenizer_files
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report import papers
from permllm_offline.sparsity.rounded_layer import Rounding
from permllm_vllm.checkpoint.companions import check_companions
from permllm_vllm.checkpoint.errors import raise_if_any
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.output import check_destination
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import (
    FOLDED_PERMUTATION,
    WEIGHT_MASK,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    QuantizationConfig,
    installed_version,
    value_kinds,
    version_of,
)
from permllm_vllm.checkpoint.writer import write_checkpoint


def convert_to_integers(
    source: Source,
    output: Path,
    values: Rounding,
    calibration: Recipe | None = None,
    *,
    force: bool = False,
    max_shard_bytes: int | None = None,
    restart: bool = False,
) -> ConversionReport:
    """Round the values of a checkpoint of this format; every other tensor stays bit for bit.

    Only norms and biases before smoothed inputs are divided. Masks, permutations and ``ignore``
    are those of the source. One matrix is in memory at a time, with ``calibration`` one decoder
    layer, and one file of ``max_shard_bytes``: by default about a decoder layer, 500 MB or more.

    Args:
        source: a checkpoint of this format.
        output: folder to write, complete or absent.
        values: to what.
        calibration: as for ``convert_to_sparse``.
        force: replace a checkpoint in the output.
        max_shard_bytes: bytes of a safetensors file.
        restart: as for ``convert_to_sparse``.

    Raises:
        OfflineError: the values are int8 or int4 already, or there are none.
        CheckpointError: the source is damaged, or the output cannot be written.
    """
    reader = CheckpointReader(source.directory)  # fused experts that are dense stay fused
    before = reader.quantization
    assert before is not None
    _check(source, reader, before, values)
    family, text = source.language.family(), None
    if calibration is not None:
        check_destination(output, source.directory, force=force)  # before hours of work
        check_companions(source.directory)
        check_groups(values, before.block_size, permuted=bool(before.runtime_permuted))
        text = CalibrationText.read(calibration, source)
    densities: dict[str, float] = {}
    rounding: FinishedRounding
    with kept_calibration(text, output, {"values": values}, restart=restart) as work:
        if text is None:
            rounding = uncalibrated = IntegerRounding(values)
            tensors = uncalibrated.rounded(_tensors(reader, before, densities))
            smoothed = False
        else:
            model = served_model(source.reader(), family, source.config)
            rounding = calibrated = text.rounding(model, values, work)
            tensors = _calibrated_tensors(reader, model, calibrated, densities)
            smoothed = calibrated.smoothed
        changes = {
            "format_version": version_of(values),
            "value_dtype": values,
            "tool_version": installed_version(),
            "smoothed": smoothed,
        }
        sizes = _sizes(reader, before.pattern, values)

        def report() -> ConversionReport:
            return _report(source, before, densities).rounded(rounding)

        write_checkpoint(
            output,
            tensors,
            QuantizationConfig.model_validate(before.to_dict() | changes),
            source.directory,
            force=force,
            max_shard_bytes=max_shard_bytes or converted_shard_bytes(sizes, family.stack),
            total_bytes=sum(sizes.values()),
            extra_files={
                **tokenizer_files(source.directory),
                **noted_papers(source.directory, rounding, before.value_dtype),
                papers.CONVERSION: lambda: json.dumps(report().to_dict(), indent=2) + "\n",
            },
        )
    return report()


def _check(
    source: Source, reader: CheckpointReader, quantization: QuantizationConfig, values: Rounding
) -> None:
    stored = quantization.value_dtype
    if WEIGHT_SCALE in value_kinds(stored):
        nothing = f"{values} would round them once more"
        if values == stored:
            nothing = "nothing to do"
        elif values == "int8":
            nothing = "int8 would be the same in more bytes"
        raise OfflineError(
            f"the values of {source.name!r} are {stored}: {nothing}. Serve it, or give --to dense."
        )
    if not reader.sparse_layers():
        raise OfflineError(
            f"{source.name!r} has the config.json of a sparse model, but no sparse layer: its "
            "weights are of another checkpoint. Copy it again."
        )


def _tensors(
    reader: CheckpointReader, quantization: QuantizationConfig, densities: dict[str, float]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the stored tensors, each sparse layer verified before; note the density of each."""
    pattern = Pattern.parse(quantization.pattern)
    sparse = set(reader.sparse_layers())
    for name in tqdm(reader.names(), desc="write"):
        module, _, kind = name.rpartition(".")
        if module in sparse and kind == WEIGHT_PACKED:
            layer = reader.layer(module)
            raise_if_any(layer.content_problems(pattern, quantization.block_size))
            densities[module] = _density(layer)
            del layer
        yield name, reader.tensor(name)


def _calibrated_tensors(
    reader: CheckpointReader,
    model: SparseModel,
    calibrated: CalibratedRounding,
    densities: dict[str, float],
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the output, what is no part of a sparse layer first; note densities."""
    sparse = set(reader.sparse_layers())
    for name in reader.names():
        module, _, kind = name.rpartition(".")
        if module not in sparse or kind == FOLDED_PERMUTATION:
            yield name, calibrated.divided(name, reader.tensor(name))
    for index, rounded in enumerate(tqdm(calibrated.layers, desc="write", unit="layer")):
        for name, tensor in model.baked(index, model.decision(index), rounded):
            module, _, kind = name.rpartition(".")
            if kind == WEIGHT_PACKED:
                densities[module] = _density(reader.layer(module))
            yield name, tensor


def _density(layer: SparseLayer) -> float:
    """Share of the weights that are not zero."""
    return int(layer.values.count_nonzero()) / (layer.out_features * layer.in_features)


def _sizes(reader: CheckpointReader, pattern: str, values: Rounding) -> dict[str, int]:
    """Bytes of every tensor of the output by its name."""
    sizes = {name: header_bytes(reader.header(name)) for name in reader.names()}
    for module in reader.sparse_layers():
        rows, octets = reader.header(f"{module}.{WEIGHT_MASK}").shape
        for kind in value_kinds(values):
            sizes[f"{module}.{kind}"] = tensor_bytes(
                kind, rows, 8 * octets, Pattern.parse(pattern), values
            )
    return sizes


def _report(
    source: Source, quantization: QuantizationConfig, densities: dict[str, float]
) -> ConversionReport:
    def permutation(name: str) -> str:
        if quantization.lists("folded", name):
            return FOLDED
        return RUN_TIME if quantization.lists("runtime_permuted", name) else NONE

    return ConversionReport(
        source=source.name,
        source_format=f"permllm, {quantization.value_dtype} values",
        target_format="permllm",
        pattern=quantization.pattern,
        block_size=quantization.block_size,
        linears=[
            ConvertedLinear(name, permutation(name), density) for name, density in densities.items()
        ],
    )
