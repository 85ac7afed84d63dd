"""What this environment can prune and serve with, and how to get what is missing.

Needs neither vLLM nor a compiler: vLLM is asked for in a process of its own, so that whatever is
wrong with it is a finding and not the end.
"""

from __future__ import annotations

from permllm_vllm.diagnosis.environment import machine, packages
from permllm_vllm.diagnosis.finding import Finding, Verdict
from permllm_vllm.diagnosis.kernels import Service, cpu_kernels, cuda_kernels, services
from permllm_vllm.diagnosis.serving import plugin, vllm

__all__ = ["Finding", "Service", "Verdict", "diagnose", "services"]


def diagnose() -> list[Finding]:
    """Look at everything, in the order in which one thing needs the other."""
    looks = (machine(), packages(), cpu_kernels(), cuda_kernels(), vllm(), plugin())
    return [finding for look in looks for finding in look]
