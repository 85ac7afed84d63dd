"""Room for keys and values that an engine is given, in vLLM's variable for it."""

import os

KV_CACHE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable: a whole number of GiB for each engine."""
DEFAULT_GIB = 1


def kv_cache_gib() -> int:
    """What the environment says, or 1: vLLM's own default takes most of the machine.

    Raises:
        ValueError: the environment says no whole number above 0.
    """
    text = os.environ.get(KV_CACHE) or str(DEFAULT_GIB)
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(
            f"a KV cache of {text!r} GiB: give a whole number, at least 1 "
            f"(--kv-cache, or {KV_CACHE})"
        )
    return int(text)


def kv_cache_environment() -> dict[str, str]:
    """The variable for a process that is started, or for this one."""
    return {KV_CACHE: str(kv_cache_gib())}
