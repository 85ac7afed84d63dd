"""The tests of dense rows of int8 values, for amx on the emulated tile unit."""

from tests.kernels.amx.emulated import NEEDS

# pytest collects what is imported; the fixture `isa` is that of this folder.
from tests.kernels.test_dense8 import (  # noqa: F401
    dense8_isa,
    test_a_row_of_zeros,
    test_integers_are_exact,
    test_largest_sums_do_not_overflow,
    test_matches_float64,
    test_padding_counts_for_nothing,
    test_threads_change_no_bit,
    test_what_has_no_copy,
)

pytestmark = NEEDS
