"""What a result was measured on, and how it is written down."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
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
SOURCES = ("csrc", "offline", "permllm_vllm", "benchmarks/*.py")
"""What is measured and what measures, as paths for git."""
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


def comparable(machine: Mapping[str, Any]) -> dict[str, Any]:
    """What two machines must have in common for their times to be comparable."""
    cpu = machine["cpu"], machine["family"], *machine["instruction_sets"]
    pages = machine.get("transparent_huge_pages")
    return {"cpu": cpu, "cores": machine["cores"], "transparent_huge_pages": pages}


def require_comparable(found: Mapping[str, Any], facts: Mapping[str, Any], what: str) -> None:
    """Check that a result was measured as a run of here and now would be.

    Args:
        found: the result, with machine and versions.
        facts: settings of the run.
        what: beginning of the message: the file, its part and "have" or "has".

    Raises:
        ValueError: other settings, another CPU, or other versions.
    """
    here = {**comparable(machine()), "versions": versions(), **facts}
    there = {**found, **comparable(found["machine"])}
    for name, value in here.items():
        if there.get(name) != value:
            raise ValueError(
                f"{what} {name} {there.get(name)!r}, this run has {value!r}: what one file "
                "has must be comparable; give another file"
            )


def commit(inside: Path = HERE) -> str | None:
    """The commit that the sources are at, uncommitted changes left out; None outside git."""
    return _git(inside, "rev-parse", "--short=12", "HEAD")


def revision(inside: Path = HERE) -> str | None:
    """The commit that the sources are at, `-dirty` where they differ from it; None outside git."""
    found = commit(inside)
    sources = (f":(top){path}" for path in SOURCES)
    changes = _git(inside, "--no-optional-locks", "status", "--porcelain", "--", *sources)
    return f"{found}-dirty" if found and changes else found


def span(begun: str | None, now: str | None) -> str | None:
    """The revision of a measurement, or those at its beginning and its end where they differ."""
    return now if now is None or begun in (None, now) else f"{begun}..{now}"


def _git(inside: Path, *words: str) -> str | None:
    try:
        found = subprocess.run(
            ["git", *words], cwd=inside, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def write_json(path: Path | str, payload: dict[str, Any], begun: str | None = None) -> None:
    """Write a result with the date, the commit, the machine and the versions of now in front.

    What the payload has of these stands in their place.

    Args:
        path: of the result.
        payload: the result.
        begun: the revision when measuring began; another one now makes the commit a span.
    """
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": span(begun, revision()),
        "machine": machine(),
        "versions": versions(),
        **payload,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)  # at once: a run that is stopped here loses nothing
