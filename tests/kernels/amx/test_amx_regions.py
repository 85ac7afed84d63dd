"""How many parallel regions a call has on AMX."""

import torch

from tests.kernels.amx.emulated import NEEDS, Emulation
from tests.kernels.test_regions import (
    EXPERT_TOKENS,
    EXPERTS,
    LAYERS,
    THREADS,
    TOKENS,
    count,
)

pytestmark = NEEDS


def test_a_call_has_one_region(emulation: Emulation, isa: str) -> None:
    torch.set_num_threads(THREADS)  # until the fixture of tests/kernels/conftest.py ends
    found = count(isa, emulation.library.count_regions)
    one = {name: [1] * len(TOKENS) for name in LAYERS}
    # The operator cuts more tokens than 2048, the emulation's does not.
    assert found == one | {EXPERTS: [1] * len(EXPERT_TOKENS)}
