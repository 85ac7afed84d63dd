"""Commands in children that can be killed, forked from a process that never ran a thread.

The process of the tests has run kernels by then, and a child forked from it would wait for threads
of OpenMP that it does not have.
"""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

from permllm_offline.cli import main
from permllm_offline.report import page

CONTEXT = multiprocessing.get_context("forkserver")
"""A process of tests has one such server, with what was asked for last when it began."""
CONTEXT.set_forkserver_preload(
    [
        "permllm_offline.pipeline",
        "tests.robustness.stages",
        "tests.offline.tiny_models",  # and the classes of transformers that a child would load
        "matplotlib.figure",
        "matplotlib.backends.backend_svg",
        __name__,
    ]
)


@dataclass(frozen=True)
class Ended:
    """How a child ended: its status, or -signal, and what it wrote to standard error."""

    status: int
    errors: str


def child(command: list[str], prepare: Callable[[], object], *, plots: bool = False) -> Ended:
    """Run a command in a child after `prepare`, which can be pickled.

    Without `plots` a report has none: drawing takes longer than to prune a tiny model.
    """
    with tempfile.NamedTemporaryFile() as errors:
        process = CONTEXT.Process(target=_run, args=(command, prepare, errors.name, plots))
        process.start()
        process.join()
        assert process.exitcode is not None
        return Ended(process.exitcode, errors.read().decode(errors="replace"))


def _run(command: list[str], prepare: Callable[[], object], errors: str, plots: bool) -> None:
    status = 99
    try:
        os.dup2(os.open(errors, os.O_WRONLY), 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not plots:
            page._plots = lambda report: []
        prepare()
        status = main(command)
    finally:
        os._exit(status)
