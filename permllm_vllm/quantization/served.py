"""What serves the sparse layers of a model: one backend, and one log line when all are packed."""

import ctypes
import functools
import hashlib
from collections import Counter
from pathlib import Path

import torch

import permllm_vllm
from permllm_vllm import ops
from permllm_vllm.backends import Backend, SelectedBackend, select_backend
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.compat import init_logger

logger = init_logger("vllm.permllm.serving")


def kernels() -> str:
    """What decides which operands the layers of a checkpoint have: code, libraries, CPU."""
    cpu = "none" if ops.missing_reason else torch.ops.permllm.cpu_instruction_set()
    cuda = "none" if ops.cuda_missing_reason else torch.ops.permllm.cuda_architectures()
    return f"permllm-vllm {permllm_vllm.__version__} {_own_digest()}, cpu {cpu}, cuda {cuda}"


@functools.cache
def _own_digest() -> str:
    return build_digest(Path(permllm_vllm.__file__).parent)


def build_digest(package: Path) -> str:
    """Digest of the libraries and sources of this package: tells builds of one version apart."""
    digest = hashlib.sha256()
    for path in sorted([*package.glob("_C*.so"), *package.rglob("*.py")]):
        digest.update(str(path.relative_to(package)).encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


def release_freed_memory() -> None:
    """Ask the allocator of the C library, where it can: glibc keeps freed pages for itself.

    After a checkpoint's tensors were packed and dropped these are hundreds of MiB.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class ServedLayers:
    """Counts a model's sparse layers from creation to packing, and reports when all are packed."""

    def __init__(self) -> None:
        self._created = 0
        self._packed: Counter[tuple[str, str]] = Counter()
        self._in_four_bits = 0
        self._backends: dict[
            tuple[torch.device, torch.dtype, torch.dtype, bool], SelectedBackend
        ] = {}

    def backend(
        self,
        device: torch.device,
        dtype: torch.dtype,
        values: torch.dtype,
        *,
        experts: bool = False,
    ) -> SelectedBackend:
        """What packs and multiplies; chosen once, so that a fallback is warned about once."""
        key = (device, dtype, values, experts)
        if key not in self._backends:
            self._backends[key] = select_backend(device, dtype, values, experts=experts)
        return self._backends[key]

    def created(self) -> None:
        """A layer waits for its weights."""
        self._created += 1

    def packed(
        self,
        backend: Backend,
        checkpoint: QuantizationConfig,
        dtype: torch.dtype,
        *,
        four_bits: bool = False,
    ) -> None:
        """A layer of activations of `dtype` is ready, its checkpoint's tensors are dropped.

        The last one gives their memory back and logs the line; a reload of the weights does again.
        """
        self._packed[(backend.name, backend.instruction_set)] += 1
        self._in_four_bits += four_bits
        if self._packed.total() < self._created:
            return
        release_freed_memory()
        shares = ", ".join(
            f"backend {name} ({instruction_set}) serves {layers} sparse linear layers"
            for (name, instruction_set), layers in sorted(self._packed.items())
        )
        logger.info(
            "PermLLM %s: %s (%s, %s values%s, %s activations)",
            permllm_vllm.__version__,
            shares,
            checkpoint.pattern,
            checkpoint.value_dtype,
            f", those of {self._in_four_bits} in 4 bits" if self._in_four_bits else "",
            str(dtype).removeprefix("torch."),
        )
        self._packed.clear()
        self._in_four_bits = 0
