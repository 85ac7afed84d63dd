"""Write a model that is stored in 8 or 4 bits as a dense one, as compressed-tensors restores it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm_offline.conversion.report import ConversionReport
from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.loading import DTYPES, Source
from permllm_offline.model.quantized import require_read
from permllm_offline.model.tokenizer import tokenizer_files
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.headers import natural_order
from permllm_vllm.checkpoint.numbers import number_problems
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.stored_otherwise import (
    COMPRESSED_TENSORS,
    DENSE,
    FP8,
    StoredOtherwise,
    quantization_entries,
    stored_otherwise,
)
from permllm_vllm.checkpoint.writer import MAX_SHARD_BYTES, write_checkpoint

_QUANTIZED = ("weight_packed", "weight_scale", "weight_scale_inv")
"""What a quantized matrix has, and a plain one has not."""
_KEPT = ("weight", "bias")
"""What is left of a module once its weight is restored: nothing of activations."""
_OF_CACHES = re.compile(r"(q|k|v|prob)_(scale|zero_point)")
"""What dense models have no use for either."""

Restore = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The tensors of one module by their names -> those of the dense one."""


def decompress(
    source: Source, output: Path, *, force: bool = False, max_shard_bytes: int | None = None
) -> ConversionReport:
    """Write a model of compressed-tensors, or in blocks of FP8, in the dtype of its config.json.

    One matrix is in memory at a time, and one file of the output.

    Raises:
        OfflineError: weights in a form that compressed-tensors does not restore, or there is none.
        CheckpointError: weights that are damaged, or an output that cannot be written.
    """
    config = read_json(source.directory / CONFIG_NAME)
    found = stored_otherwise(config)
    assert found is not None
    dtype = source.dtype if source.dtype in DTYPES.values() else torch.bfloat16
    restore = _restoring(source, config, found, dtype)
    files = StoredFiles(source.directory)
    write_checkpoint(
        output,
        _tensors(source, files, restore),
        None,
        source.directory,
        force=force,
        max_shard_bytes=max_shard_bytes or MAX_SHARD_BYTES,
        total_bytes=_most_bytes(files, dtype),
        extra_files=tokenizer_files(source.directory),
    )
    return ConversionReport(source.name, found.method, "dense", "", 0, [])


def _restoring(
    source: Source, config: Mapping[str, Any], found: StoredOtherwise, dtype: torch.dtype
) -> Restore:
    """What makes a dense module of a quantized one."""
    size = quantization_entries(config).get("weight_block_size")
    if found.layout != DENSE or found.method not in (COMPRESSED_TENSORS, FP8):
        require_read(source.name, config)
    try:
        from compressed_tensors.entrypoints.convert import (
            CompressedTensorsDequantizer,
            FP8BlockDequantizer,
        )
    except ImportError as error:
        raise OfflineError(
            f"{source.name!r} is stored by {found.method!r}, which the package compressed-tensors "
            "restores, of version 0.17 or later: `pip install compressed-tensors` (vLLM has it)."
        ) from error
    if found.method == FP8:
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int for n in size)):
            raise OfflineError(
                f"{source.name!r} is stored in FP8 with weight_block_size {size!r}: what is "
                "restored has blocks of rows and columns, [128, 128] for example. Load it by "
                "transformers with FineGrainedFP8Config(dequantize=True), and `save_pretrained` it."
            )
        return FP8BlockDequantizer(targets=["re:.*"], weight_block_size=size, dtype=dtype).process
    try:
        restoring = CompressedTensorsDequantizer(source.directory, dtype=dtype)
    except Exception as error:  # pydantic's and its own
        raise OfflineError(
            f"the quantization_config of {source.name!r} is not one that compressed-tensors reads "
            f"({first_line(error)}): fetch the model again, or give the one from before its "
            "quantization."
        ) from error
    return restoring.process


def _tensors(source: Source, files: StoredFiles, restore: Restore) -> Iterator[tuple[str, Tensor]]:
    """Yield the dense model, one module in memory at a time."""
    modules: dict[str, list[str]] = {}
    for name in natural_order(files.names()):
        module, _, kind = name.rpartition(".")
        if not _OF_CACHES.fullmatch(kind):
            modules.setdefault(module, []).append(name)
    for module, names in modules.items():
        tensors = {name: files.part(name, 0, files.header(name).shape) for name in names}
        if any(f"{module}.{kind}" in tensors for kind in _QUANTIZED):
            tensors = _restored(source, module, tensors, restore)
        for name in tuple(tensors):
            tensor = tensors.pop(name)
            if tensor.dtype.itemsize == 1 and tensor.dtype != torch.bool:
                value = f"{tensor.dtype} that nothing says how to restore"
                rule = "each weight of 8 bits has a scale in a tensor of its own module"
                remedy = "give the model from before its quantization"
                raise Problem(name, value, rule, remedy).as_error()
            yield name, tensor


def _restored(
    source: Source, module: str, tensors: dict[str, Tensor], restore: Restore
) -> dict[str, Tensor]:
    """The weight and bias of a module that is quantized."""
    try:
        dense = restore(dict(tensors))
    except Exception as error:  # of whatever kind a tensor that does not fit raises there
        raise OfflineError(
            f"compressed-tensors cannot restore {module} of {source.name!r} ({first_line(error)}): "
            "fetch the model again, or give the one from before its quantization."
        ) from error
    weight = f"{module}.weight"
    if weight not in dense:
        rule = "what config.json says of its quantization covers every quantized matrix"
        raise Problem(weight, f"only {', '.join(tensors)}", rule, FETCH_AGAIN).as_error()
    raise_if_any(number_problems(weight, dense[weight]))
    return {name: one for name, one in dense.items() if name.rpartition(".")[2] in _KEPT}


def _most_bytes(files: StoredFiles, dtype: torch.dtype) -> int:
    """Bytes of the dense model at most, for the check of free disk: 4 bits in an int32 become 8."""

    def largest(name: str) -> int:
        numbers = math.prod(files.header(name).shape)
        packed = 8 if name.endswith(".weight_packed") else 1
        return numbers * packed * max(dtype.itemsize, 2)

    return sum(map(largest, files.names()))
