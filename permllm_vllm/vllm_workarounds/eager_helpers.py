"""Helpers of vLLM that are compiled even in an eager engine, on a machine without a C++ compiler.

`--enforce-eager` leaves a few functions to Inductor (the rank of a token among log-probabilities,
the embedding of a part of a vocabulary: `torch.compile` in `vllm/v1/sample/ops/logprobs.py` and
`vllm/model_executor/layers/vocab_parallel_embedding.py`), and a request that needs one would end
the engine.

Upstream: not reported. For vLLM 0.32.
"""

import functools
import sysconfig
from pathlib import Path

import torch

from permllm_vllm.compat import init_logger

logger = init_logger("vllm.permllm.compiler")


@functools.cache
def missing_for_compiling() -> str:
    """What Inductor needs on a CPU and does not find: a phrase, empty where all is there."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # the latter of a compiler that may not be run
        return "no C++ compiler"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "no header Python.h"
    return ""


def keep_helpers_eager(*, eager: bool) -> None:
    """Have vLLM's helpers run as they are where an eager engine could not compile them.

    It holds for the whole process.
    """
    if not eager or not (missing := missing_for_compiling()):
        return
    torch.compiler.set_stance("force_eager")
    logger.warning(
        "%s is here, so torch.compile is off in this process: what vLLM compiles even with "
        "--enforce-eager runs as it is",
        missing[0].upper() + missing[1:],
    )
