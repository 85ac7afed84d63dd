"""Commands in children that can be killed, forked from a process that never ran a thread.

The process of the tests has run kernels by then, and a child forked from it would wait for threads
of OpenMP that it does not have.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable

from permllm_offline.cli import main

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["permllm_offline.pipeline", "tests.robustness.stages", __name__])


def child(command: list[str], prepare: Callable[[], object]) -> int:
    """Run a command in a child after `prepare`, which can be pickled; its status, or -signal."""
    process = _CONTEXT.Process(target=_run, args=(command, prepare))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _run(command: list[str], prepare: Callable[[], object]) -> None:
    status = 99
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        prepare()
        status = main(command)
    finally:
        os._exit(status)
