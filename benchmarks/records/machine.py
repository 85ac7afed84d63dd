"""What a result was measured on, and how it is written down."""

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx512_vbmi2",
    "amx_tile",
    "amx_bf16",
    "amx_int8",
)
DISTRIBUTIONS = ("permllm-vllm", "vllm", "torch", "transformers", "safetensors")


def _proc_fields(path: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    return fields


def machine() -> dict[str, Any]:
    """Describe the CPU and its memory: model, cores, instruction sets, bytes, huge-page mode."""
    cpu = _proc_fields("/proc/cpuinfo")
    flags = set(cpu.get("flags", "").split())
    huge_pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": cpu.get("model name", platform.processor()),
        "family": f"{cpu.get('cpu family', '?')}/{cpu.get('model', '?')}",
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "transparent_huge_pages": huge_pages.read_text().strip() if huge_pages.exists() else None,
        "os": platform.platform(),
    }


def machine_class() -> str:
    """Name the class of this CPU: `amx`, `avx512`, or `other`."""
    sets = machine()["instruction_sets"]
    if "amx_bf16" in sets:
        return "amx"
    return "avx512" if {"avx512_bf16", "avx512_vbmi2"} <= set(sets) else "other"


def versions() -> dict[str, str]:
    """Versions of Python and of every distribution a result depends on."""
    found = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit that the sources are at, uncommitted changes left out; None outside git."""
    command = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        found = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(path: Path | str, payload: dict[str, Any]) -> None:
    """Write a result with the date, the commit, the machine and the versions of now in front."""
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        **payload,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)  # at once: a run that is stopped here loses nothing
