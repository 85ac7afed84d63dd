"""The tests of float16 activations, for amx on the emulated tile unit."""

from tests.kernels.amx.emulated import NEEDS

# pytest collects what is imported; the fixture `isa` is that of this folder.
from tests.kernels.test_activations import (  # noqa: F401
    path,
    test_every_float16_passes_unchanged,
    test_float16_is_rounded_to_nearest_even,
    test_matches_float64,
)

pytestmark = NEEDS
