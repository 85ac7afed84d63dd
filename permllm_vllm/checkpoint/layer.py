"""One sparse linear layer as a checkpoint holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.int4 import multiplier_problems
from permllm_vllm.checkpoint.numbers import number_problems, scale_problems
from permllm_vllm.checkpoint.packing import count_violations, first_violation, unpack
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import is_bijective, unpermute_columns
from permllm_vllm.checkpoint.schema import (
    BIAS,
    FOLDED_PERMUTATION,
    INPUT_PERMUTATION,
    WEIGHT_MASK,
    WEIGHT_MULTIPLIER,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
)


@dataclass(frozen=True)
class SparseLayer:
    """The tensors of a sparse layer of `out` rows and `in` channels, pattern N:M.

    `values` [out, in * N / M]; `mask` uint8 [out, in / 8]; the permutations uint8 [in], at most one
    of them; `scale` float32 [out], for integers only; `bias` [out]; `name`, the module, is for
    messages. int4 values come as int8, multiplied by their `multipliers` uint8
    [out, ceil(in / 64)], which are kept to be checked.
    """

    values: Tensor
    mask: Tensor
    input_permutation: Tensor | None = None
    folded_permutation: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    name: str = "layer"
    multipliers: Tensor | None = None

    @property
    def out_features(self) -> int:
        """Number of rows."""
        return self.mask.shape[0]

    @property
    def in_features(self) -> int:
        """Number of input channels."""
        return self.mask.shape[1] * 8

    def dense(self, pattern: Pattern, block_size: int) -> Tensor:
        """Return the weight [out, in] that the served layer multiplies its input with.

        A run-time permutation is undone. A folded one stays: the layer's input comes in folded
        order. dtype of `values`; float32 for integers, which are multiplied with their scale.
        Raises `CheckpointError` when the contents break a rule.
        """
        raise_if_any(self.content_problems(pattern, block_size))
        weight = unpack(self.values, self.mask)
        if self.scale is not None:
            weight = weight.float() * self.scale.unsqueeze(1)
        if self.input_permutation is not None:
            weight = unpermute_columns(weight, self.input_permutation, block_size)
        return weight

    def content_problems(self, pattern: Pattern, block_size: int) -> list[Problem]:
        """List every rule that mask bits, permutations, scales and values break."""
        problems = []
        if violation := first_violation(self.mask, pattern):
            row, group, count = violation
            value = (
                f"{count} bits in row {row}, group {group} "
                f"({count_violations(self.mask, pattern)} such groups)"
            )
            rule = f"every group keeps exactly {pattern.kept} of {pattern.group}"
            problems.append(Problem(f"{self.name}.{WEIGHT_MASK}", value, rule, FETCH_AGAIN))
        for kind, permutation in (
            (INPUT_PERMUTATION, self.input_permutation),
            (FOLDED_PERMUTATION, self.folded_permutation),
        ):
            if permutation is not None and not is_bijective(permutation, block_size):
                value = f"no bijection in {_first_bad_block(permutation, block_size)}"
                rule = f"every block holds each of 0 .. {block_size - 1} once"
                problems.append(Problem(f"{self.name}.{kind}", value, rule, FETCH_AGAIN))
        if self.scale is not None:
            problems += scale_problems(f"{self.name}.{WEIGHT_SCALE}", self.scale)
        if self.multipliers is not None:
            name = f"{self.name}.{WEIGHT_MULTIPLIER}"
            problems += multiplier_problems(name, self.multipliers)
        for kind, numbers in ((WEIGHT_PACKED, self.values), (BIAS, self.bias)):
            if numbers is not None:
                problems += number_problems(f"{self.name}.{kind}", numbers)
        return problems


def _first_bad_block(permutation: Tensor, block_size: int) -> str:
    """Name the first block of a permutation that is no bijection."""
    for start in range(0, permutation.numel(), block_size):
        if not is_bijective(permutation[start : start + block_size], block_size):
            return f"block {start // block_size}"
    return "the last block"
