"""The tests of every instruction set, for amx on the emulated tile unit.

Packing in C++, the choice of a kernel and the kernels, together, at every count of tokens where
another kernel begins: what a CPU with AMX runs when tests/kernels are run on it.
"""

from tests.kernels.amx.emulated import NEEDS

# pytest collects what is imported; the fixture `isa` is that of this folder.
from tests.kernels.test_batch_invariance import (  # noqa: F401
    subject,
    test_a_token_does_not_depend_on_the_others,
    test_results_change_with_the_kernel_and_nowhere_else,
)
from tests.kernels.test_cpu import (  # noqa: F401
    test_any_leading_dimensions,
    test_each_output_is_its_own_product,
    test_every_weight_is_exact,
    test_matches_float64,
    test_negative_zero_is_a_value,
    test_no_tokens,
    test_non_contiguous_inputs,
    test_non_finite_inputs_stay_in_their_token,
    test_packed_bytes,
    test_threads_do_not_change_the_result,
    test_unaligned_inputs,
)
from tests.kernels.test_experts import (  # noqa: F401
    test_experts_elsewhere_are_left_out,
    test_is_the_sum_of_its_experts,
    test_more_rows_than_are_in_memory_at_a_time,
    test_other_activations,
    test_rows_with_strides,
    test_threads_change_no_bit,
)

pytestmark = NEEDS
