"""What the loaded tensors of a sparse layer must hold, checked once before they are packed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError, Problem, raise_if_any
from permllm_vllm.checkpoint.int4 import multiplier_problems
from permllm_vllm.checkpoint.numbers import number_problems, scale_problems
from permllm_vllm.checkpoint.packing import first_violation
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import is_bijective
from permllm_vllm.quantization.sources import ShardId, TensorSource

_RULES: dict[str, Callable[[str, Tensor], list[Problem]]] = {
    schema.WEIGHT_PACKED: number_problems,
    schema.WEIGHT_SCALE: scale_problems,
    schema.WEIGHT_MULTIPLIER: multiplier_problems,
    schema.BIAS: number_problems,
}
"""What the numbers of each kind of tensor must keep."""


def check_mask(
    source: TensorSource, mask: Tensor, output_sizes: Sequence[int], pattern: Pattern
) -> None:
    """Raise CheckpointError unless every group of a mask `[out, in / 8]` keeps exactly N weights.

    `output_sizes` are the rows of the parts on this rank.
    """
    for part, rows in enumerate(mask.split(list(output_sizes))):
        violation = first_violation(rows, pattern)
        if violation is not None:
            row, group, kept = violation
            raise CheckpointError(
                f"{source.name((part,))} keeps {kept} weights in group {group} of row {row} (of "
                f"this rank's slice), but {pattern} means exactly {pattern.kept}. The checkpoint "
                "is damaged: copy it again, or run `permllm-offline prune` again."
            )


def check_numbers(
    tensors: Sequence[tuple[TensorSource, Tensor]], output_sizes: Sequence[int]
) -> None:
    """Raise CheckpointError for values or biases that are not finite, bad scales and multipliers.

    Tensors of other kinds pass. `output_sizes` are the rows of the parts on this rank.
    """
    problems: list[Problem] = []
    for source, tensor in tensors:
        rule = _RULES.get(source.kind)
        if rule is None:
            continue
        for part, rows in enumerate(tensor.split(list(output_sizes))):
            problems += rule(source.name((part,)), rows)
    raise_if_any(list(dict.fromkeys(problems)))  # parts may be one tensor of the checkpoint


def shared_permutation(source: TensorSource, copies: Tensor) -> Tensor:
    """The permutation `[in]` of all parts of a layer, from the copy of each, `[parts, in]`.

    Raises:
        CheckpointError: they differ, or are no permutation.
    """
    first = copies[0]
    for part in range(1, copies.shape[0]):
        if not torch.equal(copies[part], first):
            channel = int((copies[part] != first).nonzero()[0])
            raise CheckpointError(
                f"{source.name((part,))} differs from {source.name((0,))} (first at channel "
                f"{channel}: {int(copies[part, channel])} against {int(first[channel])}), but "
                "linears that read one input must share one permutation. Prune the model again "
                "with `permllm-offline prune`."
            )
    require_bijection(source, first, None)
    return first


def require_bijection(source: TensorSource, permutation: Tensor, shard_id: ShardId) -> None:
    """Raise CheckpointError unless every block of `[in]` holds each of its channels once."""
    block_size = source.layer.checkpoint.block_size
    if not is_bijective(permutation, block_size):
        raise CheckpointError(
            f"{source.name(source.layer.parts(shard_id))} is no permutation: every block of "
            f"{block_size} must hold each of 0..{block_size - 1} once. The checkpoint is damaged: "
            "copy it again, or run `permllm-offline prune` again."
        )
