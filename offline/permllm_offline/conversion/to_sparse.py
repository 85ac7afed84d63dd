"""Write a sparse checkpoint in this format: of another tool, or ours with integer values."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Literal

from torch import Tensor
from tqdm import tqdm

from permllm_offline.conversion.calibrated_rounding import CalibratedRounding
from permllm_offline.conversion.calibration_text import CalibrationText, kept_calibration
from permllm_offline.conversion.integer_rounding import IntegerRounding
from permllm_offline.conversion.pattern_choice import Judged, ignored, judge
from permllm_offline.conversion.published_masks import open_masks
from permllm_offline.conversion.report import (
    DENSE,
    NONE,
    ConversionReport,
    ConvertedLinear,
    FinishedRounding,
)
from permllm_offline.conversion.rounding_notice import noted_papers
from permllm_offline.conversion.sources import WeightSource, open_weights
from permllm_offline.conversion.sparse_model import SparseModel
from permllm_offline.conversion.to_integers import convert_to_integers
from permllm_offline.conversion.verdicts import BLOCK_SIZE
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.memory import converted_shard_bytes
from permllm_offline.model.architecture import require_language_model
from permllm_offline.model.loading import Source, open_source
from permllm_offline.model.sparse_bytes import sparse_bytes
from permllm_offline.model.stored import header_bytes
from permllm_offline.model.tokenizer import tokenizer_files
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report import papers
from permllm_offline.sparsity.decisions import LayerDecision, decide
from permllm_vllm.checkpoint.companions import check_companions
from permllm_vllm.checkpoint.output import check_destination
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import QuantizationConfig, is_of_this_format
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.writer import write_checkpoint

logger = logging.getLogger(__name__)

Values = Literal["auto", "int8", "int4"]
"""Dtype of the kept weights; ``auto``: as they are."""


def convert_to_sparse(
    model: str,
    output: Path,
    *,
    pattern: Pattern | None = None,
    strict: bool = False,
    values: Values = "auto",
    calibration: Recipe | None = None,
    masks: str | None = None,
    force: bool = False,
    max_shard_bytes: int | None = None,
    restart: bool = False,
) -> ConversionReport:
    """Convert a checkpoint that holds N:M zeros, or gets them; the output is complete or absent.

    Every weight keeps its value bit for bit (a pruned negative zero becomes a zero), or is rounded
    to integers, which those of this format may be too: see ``convert_to_integers``. Linears that
    do not obey the pattern are left dense and listed in ``ignore``, all experts of a layer where
    one does not. Two passes over the source, or three with ``calibration``, one decoder layer in
    memory at a time.

    Args:
        model: folder or hub name.
        output: folder to write.
        pattern: N and M; by default the strictest that most linears obey.
        strict: raise instead of leaving a linear dense.
        values: ``int8`` and ``int4`` round what is kept, by the weights alone or as
            ``calibration`` says.
        calibration: the text that integers are chosen with, by the recipe's data sets and what
            it says of windows; its ``smoothing``, ``seed`` and ``device``. All else in it is of no
            use. A run that was cut off goes on after the last decoder layer that the text passed.
        masks: npz of masks for a dense model, its folder, or its name on the hub.
        force: replace a checkpoint in the output.
        max_shard_bytes: bytes of a safetensors file, which is in memory; by default about a decoder
            layer, 500 MB or more.
        restart: remove what a run that was cut off left of a calibration.

    Raises:
        OfflineError: unsupported source, or nothing in it that this format can hold.
        CheckpointError: a damaged source, kept weights or biases that are not finite, or an output
            that cannot be written.
    """
    if calibration is not None and values == "auto":
        raise OfflineError(
            "--dataset is calibration text for values that are rounded to integers: give --values "
            "int8 or int4 as well, or leave it out."
        )
    opened = None if masks is None else open_masks(masks)  # the smaller download
    found = open_source(model)
    if values != "auto" and is_of_this_format(read_json(found.directory / CONFIG_NAME)):
        if pattern is not None or strict or masks is not None:
            raise OfflineError(
                "--pattern, --strict and --masks are about what is found in a source: leave them "
                f"out, {model!r} is of this format."
            )
        return convert_to_integers(
            found,
            output,
            values,
            calibration,
            force=force,
            max_shard_bytes=max_shard_bytes,
            restart=restart,
        )
    require_language_model(found)
    check_destination(output, found.directory, force=force)
    check_companions(found.directory)
    source, family = open_weights(found, opened), found.language.family()
    text = None if calibration is None else CalibrationText.read(calibration, found)
    judged = judge(source, family, found.config, pattern)
    report = _report(model, judged)
    _check(report, strict=strict)
    choices = {"values": values, "pattern": str(judged.pattern)}
    files = [] if opened is None else [opened.file]
    with kept_calibration(text, output, choices, files, restart=restart) as work:
        calibrated = None
        if values != "auto" and text is not None:
            calibrated = text.rounding(sparse_model(judged), values, work)
        return _write(
            output,
            found,
            judged,
            report,
            values,
            calibrated,
            force=force,
            max_shard_bytes=max_shard_bytes,
        )


def _write(
    output: Path,
    found: Source,
    judged: Judged,
    report: ConversionReport,
    values: Values,
    calibrated: CalibratedRounding | None,
    *,
    force: bool,
    max_shard_bytes: int | None,
) -> ConversionReport:
    """Write what was judged, and report how its values were rounded."""
    source, family, dtype = judged.source, judged.family, judged.value_dtype()
    uncalibrated = IntegerRounding(values) if values != "auto" and calibrated is None else None
    rounding: FinishedRounding | None = uncalibrated or calibrated
    noted = {} if rounding is None else noted_papers(found.directory, rounding, dtype)
    quantization = QuantizationConfig(
        pattern=str(judged.pattern),
        block_size=BLOCK_SIZE,
        value_dtype=dtype if values == "auto" else values,
        ignore=ignored(judged),
        smoothed=calibrated is not None and calibrated.smoothed,
    )
    sizes = {name: header_bytes(source.header(name)) for name in source.names()}

    def final() -> ConversionReport:
        return report if rounding is None else report.rounded(rounding)

    tensors = _tensors(judged, calibrated)
    write_checkpoint(
        output,
        tensors if uncalibrated is None else uncalibrated.rounded(tensors),
        quantization,
        found.directory,
        force=force,
        max_shard_bytes=max_shard_bytes or converted_shard_bytes(sizes, family.stack),
        total_bytes=_written_bytes(report, sizes, source, quantization),
        extra_files={
            **tokenizer_files(found.directory),
            **noted,
            papers.CONVERSION: lambda: json.dumps(final().to_dict(), indent=2) + "\n",
        },
    )
    return final()


def _report(model: str, judged: Judged) -> ConversionReport:
    linears = []
    for index, layer in enumerate(judged.layers):
        for verdict in layer:
            permutation = NONE if verdict.holds else DENSE
            for linear, density in verdict.density.items():
                name = judged.family.stored_name(index, linear)
                linears.append(ConvertedLinear(name, permutation, density, verdict.reason))
    return ConversionReport(
        source=model,
        source_format=judged.source.description,
        target_format="permllm",
        pattern=str(judged.pattern),
        block_size=BLOCK_SIZE,
        linears=linears,
    )


def _check(report: ConversionReport, *, strict: bool) -> None:
    dense = report.left_dense
    if not report.linears:
        raise OfflineError(
            f"{report.source!r} stores no decoder layer under the names of its architecture: "
            "it was saved from a bare model, or is of another one. Load it with the class that its "
            "config.json names, and `save_pretrained` it."
        )
    if len(dense) == len(report.linears):
        reasons = dict.fromkeys(linear.reason for linear in dense)
        raise OfflineError(
            f"no linear of {report.source!r} obeys {report.pattern}: "
            f"{'; '.join(list(reasons)[:3])}. Prune its dense original with "
            "`permllm-offline prune`."
        )
    if dense and strict:
        raise OfflineError(
            f"{len(dense)} of {len(report.linears)} linears do not obey {report.pattern}, the first"
            f" is {dense[0].name}: {dense[0].reason}. Leave out --strict to keep them dense."
        )
    if dense:
        logger.warning(
            "%d of %d linears stay dense, the first is %s: %s",
            len(dense),
            len(report.linears),
            dense[0].name,
            dense[0].reason,
        )


def _written_bytes(
    report: ConversionReport,
    sizes: Mapping[str, int],
    source: WeightSource,
    quantization: QuantizationConfig,
) -> int:
    """Bytes of the checkpoint's tensors, from those of the dense ones by name."""
    pattern, written = Pattern.parse(quantization.pattern), dict(sizes)
    for linear in report.linears:
        if linear.permutation != DENSE:
            name = f"{linear.name}.weight"
            rows, columns = source.header(name).shape
            written[name] = sparse_bytes(
                rows, columns, pattern, quantization.value_dtype, permuted=False
            )
    return sum(written.values())


def sparse_model(judged: Judged) -> SparseModel:
    """See a source as a sparse model, by the verdicts on its decoder layers."""

    def decision(index: int) -> LayerDecision:
        stored_name = partial(judged.family.stored_name, index)
        return [
            decide(
                verdict.layout,
                {
                    linear: judged.source.kept(stored_name(f"{linear}.weight")).float()
                    for linear in verdict.layout.group.linears
                },
                None,
                judged.pattern,
            )
            for verdict in judged.layers[index]
            if verdict.holds
        ]

    count = len(judged.layers)
    return SparseModel(judged.family, judged.source, judged.pattern, count, decision)


def _tensors(judged: Judged, calibrated: CalibratedRounding | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors, one decoder layer in memory at a time."""
    source, family = judged.source, judged.family

    def left_dense(name: str) -> tuple[str, Tensor]:
        tensor = source.tensor(name)
        return name, tensor if calibrated is None else calibrated.divided(name, tensor)

    model = sparse_model(judged)
    names = source.names()
    layers = tuple(f"{family.layer_name(index)}." for index in range(len(judged.layers)))
    outside = (name for name in names if not name.startswith(layers))
    yield from map(left_dense, outside)
    for index, verdicts in enumerate(tqdm(judged.layers, desc="write")):
        prefix, stored_name = f"{family.layer_name(index)}.", partial(family.stored_name, index)
        replaced = {
            stored_name(part)
            for verdict in verdicts
            if verdict.holds
            for linear in verdict.layout.group.linears
            for part in (f"{linear}.weight", f"{linear}.bias")
        }
        for name in names:
            if name.startswith(prefix) and name not in replaced:
                yield left_dense(name)
        rounded = None if calibrated is None else calibrated.layers[index]
        yield from model.baked(index, model.decision(index), rounded)
