"""The tests of int8 values of every instruction set, for amx on the emulated tile unit."""

from tests.kernels.amx.emulated import NEEDS

# pytest collects what is imported; the fixture `isa` is that of this folder.
from tests.kernels.test_int8 import (  # noqa: F401
    int8_isa,
    test_deterministic_with_any_number_of_threads,
    test_integer_activations_are_exact,
    test_largest_sums_do_not_overflow,
    test_matches_float64,
    test_packed_bytes,
    test_the_sums_of_rows_stand_behind_the_blocks,
    test_tokens_have_their_own_scale,
)

pytestmark = NEEDS
