"""What a model stores, told by its headers alone: a local folder, or a repository of the hub."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.language_model import language_model_of
from permllm_offline.model.loading import (
    Source,
    hub_remedy,
    is_hub_name,
    open_source,
)
from permllm_offline.model.quantized import require_dense
from permllm_offline.run.local_path import local_path
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.shard import header_of
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_headers, read_json, read_weight_map
from permllm_vllm.checkpoint.tensors import require_meaning


@dataclass(frozen=True)
class StoredModel:
    """A model's configuration and the headers of its tensors by name."""

    source: Source
    tensors: Mapping[str, TensorHeader]

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(map(header_bytes, self.tensors.values()))


def read_stored(model: str) -> StoredModel:
    """Read configuration and headers of a model to plan; no weight is read or fetched.

    Args:
        model: a folder, or a hub name: then ``config.json`` and the first bytes of every
            safetensors file are fetched.

    Raises:
        OfflineError: no such model, a hub that cannot be reached, a model that is pruned already,
            or a quantized one.
        CheckpointError: no whole safetensors files, or weights of 8 bits.
    """
    if local_path(model).exists() or not is_hub_name(model):
        source = open_source(model)
        config = read_json(source.directory / CONFIG_NAME)
        files = set(read_weight_map(source.directory).values())
        headers = [read_headers(source.directory / file) for file in sorted(files)]
    else:
        source, headers, config = _read_hub(model)
    require_dense(model, config, "plan")
    tensors = {name: one for file in headers for name, one in file.items()}
    for name, header in tensors.items():
        require_meaning(name, header)
    return StoredModel(source, tensors)


def bytes_beside(source: Source, dtype: torch.dtype | None) -> int:
    """Bytes of what is beside the language model, such as a tower; in ``dtype`` where given."""
    if not source.language.beside:
        return 0
    reader = source.reader()
    beside = [name for name in reader.names() if source.language.names.own(name) is None]
    return sum(header_bytes(reader.header(name), dtype) for name in beside)


def header_bytes(header: TensorHeader, floating: torch.dtype | None = None) -> int:
    """Bytes of a tensor; dtypes that torch does not know by the same name are of 8 bits.

    Floating-point numbers are of the dtype ``floating`` where one is given.
    """
    dtype = getattr(torch, header.dtype, None)
    if floating is not None and dtype is not None and dtype.is_floating_point:
        dtype = floating
    return math.prod(header.shape) * (1 if dtype is None else dtype.itemsize)


def _read_hub(model: str) -> tuple[Source, list[dict[str, TensorHeader]], dict[str, Any]]:
    from huggingface_hub import HfApi
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        files = HfApi().get_safetensors_metadata(model).files_metadata.values()
    except Exception as error:  # transformers and the hub client raise too many kinds to list
        raise OfflineError(
            f"{model!r} is neither a local folder nor could its headers be fetched from the "
            f"Hugging Face hub ({first_line(error)}). {hub_remedy(error)}"
        ) from error
    headers = [
        {name: header_of(info.shape, info.dtype) for name, info in file.tensors.items()}
        for file in files
    ]
    language = language_model_of(config, {name for file in headers for name in file})
    return Source(model, Path(model), language), headers, config.to_dict()
