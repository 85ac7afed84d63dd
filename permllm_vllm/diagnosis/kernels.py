"""Which kernels there are, whether they are right, and what they would serve."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, fallback_reason, select_backend
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.diagnosis.environment import processor
from permllm_vllm.diagnosis.finding import INSTALL, Finding, Verdict

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: By values: bfloat16 itself rounds by up to 4e-3, activations of 8 bits by 1e-2.
LARGEST_ERRORS = {"bfloat16": 1e-2, "int8": 2e-2, "int4": 2e-2}
#: The end of the range that integers are rounded to: the latter fit 4 bits.
LARGEST_VALUES = {"int8": 127, "int4": 7}
#: Of a processor whose AMX the kernels use, as Linux names them.
AMX_FEATURES = {"amx_tile", "amx_bf16", "amx_int8"}


@dataclass(frozen=True)
class Service:
    """Which backend multiplies on a device in a dtype; `reason` says why it is no faster one."""

    device: str
    dtype: str
    backend: str
    instruction_set: str
    reason: str


def cpu_kernels() -> Iterator[Finding]:
    """Whether the compiled library loads, what it would use here, and whether it is right."""
    subject = "CPU kernels"
    if ops.missing_reason:
        remedy = f"until then layers run as dense PyTorch. {INSTALL}"
        yield Finding(subject, ops.missing_reason, Verdict.PROBLEM, remedy)
        return
    sets = ", ".join(instruction_sets())
    try:
        chosen = CpuBackend().instruction_set
    except RuntimeError as error:
        remedy = "unset PERMLLM_CPU_ISA"
        yield Finding(subject, str(error).splitlines()[0], Verdict.PROBLEM, remedy)
        return
    for values, largest in LARGEST_ERRORS.items():
        deviation = kernel_error(CpuBackend(chosen), values)
        if not deviation < largest:
            stored = torch.int8 if values in LARGEST_VALUES else torch.bfloat16
            wrong = CpuBackend(values=stored).instruction_set
            of = f"of the result with {values} values"
            found = f"{wrong} is wrong by {deviation:.1e} {of} on this machine"
            remedy = "set PERMLLM_CPU_ISA to another of " + sets + ", and report this"
            yield Finding(subject, found, Verdict.PROBLEM, remedy)
            return
    by = " by PERMLLM_CPU_ISA" if os.environ.get("PERMLLM_CPU_ISA") else ""
    others = CpuBackend(values=torch.bfloat16).instruction_set
    of = "" if others == chosen else f" for int8 values, {others} for bfloat16 values,"
    yield Finding(subject, f"{chosen} is used{of}{by} and right; this CPU and build run {sets}")
    yield from refused_amx()


def refused_amx() -> Iterator[Finding]:
    """The tile unit of a processor that has one, where Linux does not grant it to this process."""
    _, features = processor()
    if not features.issuperset(AMX_FEATURES) or "amx" in instruction_sets():
        return
    found = "the processor has it, but Linux does not grant it to this process: AVX-512 serves"
    remedy = (
        "use Linux 5.16 or newer; allow arch_prctl, which a sandbox (gVisor, a seccomp profile) "
        "may forbid; and leave out what gives a thread a small signal stack (sigaltstack) before "
        "the kernels are loaded"
    )
    yield Finding("AMX", found, Verdict.PROBLEM, remedy)


def kernel_error(backend: CpuBackend | CudaBackend, values: str, device: str = "cpu") -> float:
    """Frobenius error of a small layer, relative to the same layer through plain PyTorch.

    Args:
        backend: whose kernels; of the CPU, where it has none for such values, those of the next.
        values: of `LARGEST_ERRORS`.
        device: that the backend is for.

    Raises:
        RuntimeError: it cannot be multiplied there.
    """
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern(2, 4)
    scores = torch.rand(48, 64, 4, generator=generator)
    mask = torch.zeros(48, 64, 4).scatter_(2, scores.topk(2).indices, 1).bool().view(48, 256)
    weight = torch.randn(48, 256, generator=generator).to(torch.bfloat16)
    scale = None
    if values in LARGEST_VALUES:
        scale = weight.abs().amax(dim=1).float() / LARGEST_VALUES[values]
        weight = (weight.float() / scale.unsqueeze(1)).round().to(torch.int8)
    weights = CheckpointWeights(
        pack_values(weight, mask, pattern), pack_mask(mask), None, scale, pattern, 64
    )
    packed = backend.pack(weights)
    x = torch.randn(17, 256, generator=generator).to(torch.bfloat16)
    metadata, scales = (
        None if operand is None else operand.to(device)
        for operand in (packed.metadata, packed.scale)
    )
    found = ops.sparse_linear(
        *(x.to(device), packed.packed.to(device), metadata, None, scales, None),
        *(48, str(pattern)),
    ).cpu()
    expected = x.double() @ (weight * mask).double().t()
    if scale is not None:
        expected *= scale
    return float((found.double() - expected).norm() / expected.norm())


def cuda_kernels() -> Iterator[Finding]:
    """Whether there is a GPU, a library for it, and whether that is right."""
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists():
        yield Finding("NVIDIA driver", driver.read_text().splitlines()[0].partition(":")[2].strip())
    if not torch.cuda.is_available():
        yield Finding("GPU", "none that PyTorch can use: models are served on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
        name = torch.cuda.get_device_name(index)
        yield Finding(f"GPU {index}", f"{name}, compute capability {capability}")
    reason = fallback_reason(torch.device("cuda"), torch.bfloat16)
    remedy = f"PERMLLM_BUILD_CUDA=1 builds them; {INSTALL}" if ops.cuda_missing_reason else ""
    if reason:
        yield Finding("CUDA kernels", reason, Verdict.PROBLEM, remedy)
        return
    try:
        deviation = kernel_error(CudaBackend(torch.bfloat16), "bfloat16", "cuda")
    except RuntimeError as error:
        found = f"they do not run: {str(error).splitlines()[0]}"
        yield Finding("CUDA kernels", found, Verdict.PROBLEM, "serve the dense model until they do")
        return
    if not deviation < LARGEST_ERRORS["bfloat16"]:
        found = f"wrong by {deviation:.1e} of the result of a small layer"
        remedy = "serve the dense model, and report this"
        yield Finding("CUDA kernels", found, Verdict.PROBLEM, remedy)
        return
    yield Finding("CUDA kernels", "loaded, and right for a small layer")


def services() -> list[Service]:
    """Which backend would serve, for the CPU and the GPU if there is one, in every dtype."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [service(torch.device(device), dtype) for device in devices for dtype in DTYPES]


def service(device: torch.device, dtype: torch.dtype) -> Service:
    """Which backend would serve a bfloat16 checkpoint on `device` in `dtype`."""
    name, reason = _name(dtype), fallback_reason(device, dtype, torch.bfloat16)
    if reason:
        return Service(device.type, name, "reference", "pytorch", reason)
    try:
        backend = select_backend(device, dtype, torch.bfloat16)
    except RuntimeError as error:
        return Service(device.type, name, "none", "none", str(error).splitlines()[0])
    return Service(device.type, name, backend.name, backend.instruction_set, "")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
