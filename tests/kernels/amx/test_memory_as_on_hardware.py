"""Reads beside the arguments, for amx on the emulated tile unit."""

import multiprocessing

from tests.kernels import test_memory as memory
from tests.kernels.amx.emulated import NEEDS

pytestmark = NEEDS


def multiply_all(isa: str) -> None:
    memory.check(isa)
    memory.check_damaged(isa)


def test_reads_stay_inside(isa: str) -> None:
    """In a fork, which has the emulation and which a wrong read ends."""
    child = multiprocessing.get_context("fork").Process(target=multiply_all, args=(isa,))
    child.start()
    child.join()
    assert child.exitcode == 0
