"""compressed-tensors `sparse-24-bitmask`, which vLLM and llm-compressor read until 2026.

For a linear `L` of `out` rows and `in` channels: `L.compressed` [out, in / 2], the kept values of
every row in ascending channel; `L.bitmask` uint8 [out, ceil(in / 8)], bit `j % 8` (least
significant first) of byte `j / 8` set where channel `j` is kept; `L.shape`, the two sizes.
"""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.packing import unpack, unpack_mask
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.tensors import StoredTensors

FORMAT = "sparse-24-bitmask"
COMPRESSED, BITMASK, SHAPE = "compressed", "bitmask", "shape"
_KINDS = (COMPRESSED, BITMASK, SHAPE)
_WHOLE = ("int64", "int32")


class BitmaskWeights:
    """The matrices of a bitmask checkpoint under their dense names, decompressed when asked for.

    Raises `CheckpointError` where one of the three tensors is missing, they do not fit, or the
    matrix is there a second time as a dense one.
    """

    description = f"compressed-tensors {FORMAT}"

    def __init__(self, directory: Path) -> None:
        self._stored = StoredTensors(StoredFiles(directory))
        parts = [name.rpartition(".") for name in self._stored.names()]
        self._modules = {module for module, _, kind in parts if kind in (COMPRESSED, BITMASK)}
        for module in natural_order(self._modules):
            for kind in _KINDS:
                if f"{module}.{kind}" not in self._stored:
                    rule = f"a compressed matrix has {', '.join(_KINDS)}"
                    raise Problem(f"{module}.{kind}", "nothing", rule, FETCH_AGAIN).as_error()
            if f"{module}.weight" in self._stored:
                value, rule = "a second, dense weight", f"the weight is in {COMPRESSED} alone"
                raise Problem(f"{module}.weight", value, rule, FETCH_AGAIN).as_error()

    def names(self) -> list[str]:
        """Names of all tensors as a dense checkpoint has them."""
        return natural_order(
            name
            for name in (self._dense_name(stored) for stored in self._stored.names())
            if name is not None
        )

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor; raises CheckpointError where its parts disagree."""
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return self._stored.header(name)
        sizes = self._sizes(module)
        headers = {kind: self._stored.header(f"{module}.{kind}") for kind in (COMPRESSED, BITMASK)}
        for kind, columns in ((COMPRESSED, sizes[1] // 2), (BITMASK, sizes[1] // 8)):
            if headers[kind].shape != (sizes[0], columns):
                value = f"shape {list(headers[kind].shape)}"
                rule = f"{[sizes[0], columns]} for a matrix of {list(sizes)}"
                raise Problem(f"{module}.{kind}", value, rule, FETCH_AGAIN).as_error()
        if headers[BITMASK].dtype != "uint8":
            rule = "uint8"
            raise Problem(
                f"{module}.{BITMASK}", headers[BITMASK].dtype, rule, FETCH_AGAIN
            ).as_error()
        return TensorHeader(sizes, headers[COMPRESSED].dtype)

    def tensor(self, name: str) -> Tensor:
        """The dense tensor, bit for bit, zeros elsewhere."""
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return self._stored.tensor(name)
        self.header(name)
        return unpack(
            self._stored.tensor(f"{module}.{COMPRESSED}"),
            self._stored.tensor(f"{module}.{BITMASK}"),
        )

    def kept(self, name: str) -> Tensor:
        """Which weights are stored: explicit zeros count; of a dense tensor, which are not zero."""
        module = name.removesuffix(".weight")
        if module not in self._modules:
            return self._stored.tensor(name) != 0
        self.header(name)
        return unpack_mask(self._stored.tensor(f"{module}.{BITMASK}"))

    def _sizes(self, module: str) -> tuple[int, int]:
        """What `shape` says, which is read only where it is as small as it must be."""
        name, rule = f"{module}.{SHAPE}", "two whole numbers, the second a multiple of 8"
        header = self._stored.header(name)
        if math.prod(header.shape) != 2 or header.dtype not in _WHOLE:
            value = f"{header.dtype} of shape {list(header.shape)}"
            raise Problem(name, value, rule, FETCH_AGAIN).as_error()
        rows, columns = map(int, self._stored.tensor(name).flatten().tolist())
        if columns % 8 or min(rows, columns) < 1:
            raise Problem(name, str((rows, columns)), rule, FETCH_AGAIN).as_error()
        return rows, columns

    def _dense_name(self, stored: str) -> str | None:
        module, _, kind = stored.rpartition(".")
        if module not in self._modules or kind not in _KINDS:
            return stored
        return f"{module}.weight" if kind == COMPRESSED else None
