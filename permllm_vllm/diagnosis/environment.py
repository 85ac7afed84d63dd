"""Machine and packages."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from permllm_vllm.checkpoint.schema import DISTRIBUTION
from permllm_vllm.diagnosis.finding import INSTALL, Finding, Verdict

CPU_FEATURES = (
    *("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_vbmi2", "avx512_bf16"),
    *("amx_tile", "amx_bf16", "amx_int8"),
)


def machine() -> Iterator[Finding]:
    """Operating system, processor and the features that kernels exist for."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    model, flags = processor()
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
        yield Finding(DISTRIBUTION, found, Verdict.PROBLEM, INSTALL)
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


def processor() -> tuple[str, set[str]]:
    """Model and feature flags of the first processor, as Linux names them."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor() or "unknown", set()
    fields: dict[str, str] = {}
    for line in file.read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())
