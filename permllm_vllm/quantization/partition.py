"""Which shares of a layer's input tensor parallelism may give to a rank."""

from collections.abc import Sequence

from permllm_vllm.checkpoint.pattern import Pattern


def require_divisible(
    modules: Sequence[str],
    input_size: int,
    partition: int,
    block_size: int | None,
    pattern: Pattern,
) -> None:
    """Raise ValueError where tensor parallelism cuts the input where the format cannot be cut.

    `block_size` is that of the layer's run-time permutation, which moves channels inside a block,
    so blocks stay whole; None for a layer without one, which needs whole groups and mask bytes.
    """
    multiple = max(block_size or 0, pattern.multiple)
    if partition % multiple == 0:
        return
    ranks = input_size // partition
    if multiple == block_size:
        reason = f"it is permuted at run time in blocks of {multiple}"
    elif multiple == pattern.group:
        reason = f"its pattern {pattern} keeps {pattern.kept} of every {multiple} channels"
    else:
        reason = f"its masks are stored in bytes of {multiple} channels"
    possible = [n for n in range(ranks - 1, 0, -1) if input_size % (n * multiple) == 0]
    remedy = f"--tensor-parallel-size {possible[0]}" if possible else "an `ignore` entry"
    raise ValueError(
        f"{', '.join(modules)}: tensor parallelism over {ranks} leaves {partition} of its "
        f"{input_size} input channels on each rank, which is no multiple of {multiple}, but "
        f"{reason}. Use {remedy}."
    )
