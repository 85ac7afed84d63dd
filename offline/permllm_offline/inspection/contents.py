"""Read back what a permllm checkpoint holds, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.model.stored import header_bytes
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import SPARSE_KINDS


@dataclass(frozen=True)
class InspectedLayer:
    """One sparse linear layer as it lies on disk; ``density`` is the share of non-zero weights."""

    name: str
    out_features: int
    in_features: int
    pattern: str
    permutation: str
    value_dtype: str
    bytes: int
    dense_bytes: int
    density: float


@dataclass(frozen=True)
class Inspection:
    """All sparse layers of a checkpoint, and what it says of others."""

    directory: str
    pattern: str
    block_size: int
    layers: Sequence[InspectedLayer]
    ignore: Sequence[str] = ()
    """What is left dense, as entries of the checkpoint's `ignore`."""

    @property
    def bytes(self) -> int:
        """Bytes of all sparse layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the same layers take dense in 16 bits, or in their own wider dtype."""
        return sum(layer.dense_bytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary with the totals, for JSON."""
        totals = {"bytes": self.bytes, "dense_bytes": self.dense_bytes}
        return asdict(self) | totals | {"byte_ratio": self.bytes / self.dense_bytes}


def inspect(directory: Path) -> Inspection:
    """Read a permllm checkpoint.

    Raises:
        OfflineError: the folder holds no permllm checkpoint.
        CheckpointError: it does, and it is broken.
    """
    if directory.exists() and not directory.is_dir():
        raise OfflineError(f"{directory} is not a folder. Give the folder of a checkpoint.")
    if not (directory / "config.json").is_file():
        raise OfflineError(f"{directory} holds no config.json: give a folder with a checkpoint.")
    reader = CheckpointReader(directory)
    quantization = reader.quantization
    if quantization is None:
        raise OfflineError(
            f"{directory} holds a dense model: make a sparse one with `permllm-offline prune`."
        )
    names = reader.sparse_layers()
    if not names:
        raise OfflineError(
            f"{directory} has the config.json of a sparse model, but no sparse layer: its weights "
            "are of another checkpoint. `permllm-offline inspect --verify` says what is missing."
        )
    layers = []
    for name in names:
        layer = reader.layer(name)
        permutation = "none"
        if layer.input_permutation is not None:
            permutation = "run time"
        elif layer.folded_permutation is not None:
            permutation = "folded"
        weights = layer.out_features * layer.in_features
        tensors = [f"{name}.{kind}" for kind in SPARSE_KINDS if f"{name}.{kind}" in reader]
        layers.append(
            InspectedLayer(
                name=name,
                out_features=layer.out_features,
                in_features=layer.in_features,
                pattern=quantization.pattern,
                permutation=permutation,
                value_dtype=quantization.value_dtype,
                bytes=sum(header_bytes(reader.header(tensor)) for tensor in tensors),
                dense_bytes=weights * max(layer.values.element_size(), 2),
                density=int(layer.values.count_nonzero()) / weights,
            )
        )
    return Inspection(
        str(directory), quantization.pattern, quantization.block_size, layers, quantization.ignore
    )
