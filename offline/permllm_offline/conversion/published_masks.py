"""Masks that are published apart from their model, as those of MaskLLM (arXiv 2409.17481) are.

A file of numpy, `mask_compressed.npz`: `NAME.mask` has the bits of the weight `NAME` of a
Transformers checkpoint, row after row, the first in the most significant bit: 1 where it is kept.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.loading import hub_remedy
from permllm_offline.run.local_path import local_path

FILE = "mask_compressed.npz"
_SUFFIX = ".mask"
_LONGEST_HEADER = 1 << 12
"""More bytes than numpy writes before the bits of a mask."""
_Header = tuple[tuple[int, ...], bool, numpy.dtype]
"""Shape, whether columns come first, and dtype of an array."""


class PublishedMasks:
    """The masks in a file, each read when it is asked for.

    Args:
        name: what the user calls them.
        file: the npz.

    Raises:
        OfflineError: it is no such file, or holds something else.
    """

    def __init__(self, name: str, file: Path) -> None:
        self.name, self.file = name, file
        try:
            self._archive = numpy.load(file, allow_pickle=False)
            entries = self._archive.zip.infolist()
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise OfflineError(
                f"{file} cannot be read as masks ({first_line(error)}): give an npz, as MaskLLM's "
                f"{FILE} is one, its folder, or its name on the hub."
            ) from error
        sizes = {entry.filename.removesuffix(".npy"): entry.file_size for entry in entries}
        other = next((one for one in sizes if not one.endswith(f".weight{_SUFFIX}")), None)
        if other is not None or not sizes:
            raise OfflineError(
                f"{file} holds {other or 'nothing'}: masks are named by their weights, "
                f"model.layers.0.mlp.up_proj.weight{_SUFFIX} for example."
            )
        self._sizes = {one.removesuffix(_SUFFIX): size for one, size in sizes.items()}

    def names(self) -> list[str]:
        """Names of the weights that have a mask."""
        return list(self._sizes)

    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def mask(self, name: str, shape: Sequence[int]) -> Tensor:
        """Which weights are kept: bool, of the weight's shape.

        Raises:
            OfflineError: the file has another number of bits, or is damaged.
        """
        count = math.prod(shape)
        size = -(-count // 8)
        if not size < self._sizes[name] <= size + _LONGEST_HEADER:
            raise self._another_model(name, f"{self._sizes[name]} bytes", shape)
        try:
            header, bits = self._read(name + _SUFFIX, size)
        except Exception as error:  # a damaged archive raises too many kinds to list
            raise OfflineError(
                f"the mask of {name} in {self.file} is damaged ({first_line(error)}): fetch the "
                "file again."
            ) from error
        if header != ((size,), False, numpy.dtype(numpy.uint8)):
            raise self._another_model(name, f"{header[2]} {list(header[0])}", shape)
        kept = numpy.unpackbits(bits, count=count)
        return torch.from_numpy(kept).bool().view(tuple(shape))

    def _read(self, name: str, size: int) -> tuple[_Header, numpy.ndarray]:
        """Read what numpy says of an array, and `size` bytes of it, whatever that says."""
        with self._archive.zip.open(f"{name}.npy") as file:
            version = numpy.lib.format.read_magic(file)
            if version == (1, 0):
                header = numpy.lib.format.read_array_header_1_0(file)
            else:
                header = numpy.lib.format.read_array_header_2_0(file)
            content = file.read(size)
        if header[0] == (size,) and len(content) != size:
            raise EOFError(f"{len(content)} bytes")
        return header, numpy.frombuffer(content, numpy.uint8)

    def _another_model(self, name: str, found: str, shape: Sequence[int]) -> OfflineError:
        return OfflineError(
            f"the mask of {name} has {found}, which is not a bit for each weight of "
            f"{list(shape)}: give the model that the masks were learned for."
        )


def open_masks(name: str) -> PublishedMasks:
    """Open masks by their file, the folder that has it, or the hub's name of a repository.

    Raises:
        OfflineError: there are none, or the hub cannot be reached.
    """
    path = local_path(name)
    if path.is_file():
        return PublishedMasks(name, path)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise OfflineError(f"{name} has no {FILE}: give the folder that has it, or the file.")
        return PublishedMasks(name, path / FILE)
    from huggingface_hub import hf_hub_download

    try:
        return PublishedMasks(name, Path(hf_hub_download(name, FILE)))
    except OfflineError:
        raise
    except Exception as error:  # the hub client raises too many kinds to list
        raise OfflineError(
            f"--masks {name!r} is no file or folder here, and {FILE} was not found under that name "
            f"on the hub ({first_line(error)}). {hub_remedy(error)}"
        ) from error
