"""What vLLM does for every engine of a process, done once: most of the time of a tiny model."""

import gc
import multiprocessing
import os
from collections.abc import Callable
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any, TypeVar

Result = TypeVar("Result")


@cache
def prepare_process() -> None:
    """Change vLLM in this process, before its first engine."""
    from vllm.model_executor.models import registry
    from vllm.platforms import current_platform
    from vllm.v1.executor import multiproc_executor

    # vLLM looks at a class of models that its cache does not know in a process that imports all of
    # vLLM, lest this one should touch CUDA: 10 seconds for every family.
    registry._run_in_subprocess = _called
    # It spawns ranks, and each would import it.
    multiproc_executor.get_mp_context = _Context
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["vllm.v1.executor.multiproc_executor", "vllm.v1.worker.cpu_worker", __name__]
    )
    # It looks for kernels of Triton in all modules, and wraps the wrappers of the last engine.
    once = cache(current_platform.register_triton_kernel_overrides)
    current_platform.register_triton_kernel_overrides = once
    # It collects garbage eight times for an engine, through all that it has imported unless that
    # stays frozen.
    gc.unfreeze = lambda: None


def _called(function: Callable[[], Result]) -> Result:
    return function()


class _Rank(ForkServerProcess):
    """A rank, with the variables that hold when it is made: the server has older ones."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.update(self._environment)
        super().run()


class _Context(ForkServerContext):
    """Ranks are forked from a process that has imported vLLM and run nothing."""

    Process = _Rank
