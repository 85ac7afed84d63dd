"""How many parallel regions a call has on AMX."""

import torch

from tests.kernels.amx.emulated import NEEDS, Emulation
from tests.kernels.test_regions import LAYERS, THREADS, TOKENS, count

pytestmark = NEEDS


def test_a_call_has_one_region(emulation: Emulation, isa: str) -> None:
    torch.set_num_threads(THREADS)  # until the fixture of tests/kernels/conftest.py ends
    found = count(isa, emulation.library.count_regions)
    assert found == {name: [1] * len(TOKENS) for name in LAYERS}
