"""How many parallel regions a call has on AMX."""

import torch

from tests.kernels.amx.emulated import NEEDS, Emulation
from tests.kernels.test_regions import THREADS, check, count

pytestmark = NEEDS


def test_a_call_has_the_regions_of_the_rule(emulation: Emulation, isa: str) -> None:
    torch.set_num_threads(THREADS)  # until the fixture of tests/kernels/conftest.py ends
    check(isa, count(isa, emulation.library.count_regions))
