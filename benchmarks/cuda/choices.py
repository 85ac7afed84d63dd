"""Times kernels that are forced against each other, where the operator chooses by a guess.

    python -m benchmarks.cuda.choices --json results.json

From 65 to 256 tokens the kernel for few tokens against those for many, with every tile, with a
permutation and without, and of int8 values; for 4096 tokens tiles of 128 against those of 256; for
1 and 64 tokens the splits of inputs and the rows of blocks, with both kinds of values. The operator
itself and cuBLAS have the same turns. A kernel that this GPU or this build lacks is left out, with
a line why. Narrow layers come first; nothing is begun after --seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.cuda import INCOMPLETE
from benchmarks.cuda.card import this_card
from benchmarks.cuda.contestants import (
    CUDA,
    DENSE,
    INT8,
    NO_PERMUTATION,
    OURS,
    UNPERMUTED,
    on_gpu,
)
from benchmarks.cuda.kernels import LLAMA_3_8B, measure
from benchmarks.cuda.rows import Row, lines_of, table
from benchmarks.records.machine import revision, write_json
from benchmarks.records.result_file import new_result
from benchmarks.shapes import LLAMA_2_7B, parse_shape, random_layer

#: The border lies where few blocks share a layer: those with the fewest outputs come first.
SHAPES = tuple(sorted(dict.fromkeys((*LLAMA_2_7B, *LLAMA_3_8B))))
TOKENS = (65, 96, 128, 160, 192, 256)
LARGE = 4096
FEW = (1, 64)
ALL_TOKENS = (*TOKENS, LARGE, *FEW)
SPLITS = (1, 2, 4)
"""`few_tokens_plan.h` splits narrow layers alone. With int8 values a wide one may gain too: two
blocks of a processor issue too few instructions for the bytes that it can have."""


def forced_kernels() -> list[str]:
    """The kernels for many tokens that may run here, with their tiles."""
    built = torch.ops.permllm.cutlass_architectures().split()
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) == (9, 0) and "90" in built:
        return [f"many_tokens_sm90:{tile}" for tile in (64, 128, 256)]
    if major == 10 and "100" in built:
        return [f"many_tokens_sm100:{tile}" for tile in (64, 128, 256)]
    return ["many_tokens_mma:64", "many_tokens_mma:128"]


def contestants(tokens: int) -> list[str]:
    """Who has a turn with so many tokens."""
    if tokens in FEW:
        few = [f"few_tokens:128:{splits}" for splits in SPLITS]
        if tokens > 32:
            few += ["few_tokens:192", "few_tokens:256"]
        return [OURS, *few, INT8, *(f"{name}, int8" for name in few), DENSE]
    many = forced_kernels()
    if tokens == LARGE:
        tiles = [name for name in many if not name.endswith(":64")]
        return [UNPERMUTED, *(f"{name}, {NO_PERMUTATION}" for name in tiles), DENSE]
    plain = ["few_tokens", "few_tokens:128", "few_tokens:192", "few_tokens:256", *many]
    permuting = [f"many_tokens_sm90_permuting:{tile}" for tile in (32, 64)]
    return [
        UNPERMUTED,
        *(f"{name}, {NO_PERMUTATION}" for name in plain),
        OURS,
        *plain,
        *(permuting if many[0].startswith("many_tokens_sm90") else []),
        INT8,
        "few_tokens, int8",
        "many_tokens_mma, int8",
        DENSE,
    ]


def measured(
    shapes: Sequence[tuple[int, int]], tokens: Sequence[int], speed: float, end: float
) -> Iterator[tuple[tuple[int, int], int, list[Row]]]:
    """Yields the rows of every shape and number of tokens; begins nothing after `end`."""
    lost: set[str] = set()
    for shape in shapes:
        if time.monotonic() >= end:
            return
        layer = on_gpu(random_layer(*shape, drawn_on=CUDA))
        for all_names, numbers in _rounds(tokens).items():
            if time.monotonic() >= end:
                return
            names = [name for name in all_names if name not in lost]
            tried = set(names)
            for m, found in zip(numbers, measure(layer, numbers, names, speed), strict=False):
                yield shape, m, found
                if time.monotonic() >= end:
                    break
            lost |= tried.difference(names)  # measure takes out who cannot run at all


def _rounds(tokens: Sequence[int]) -> dict[tuple[str, ...], list[int]]:
    """Those who have turns with the same numbers of tokens, and these."""
    found: dict[tuple[str, ...], list[int]] = {}
    for m in tokens:
        found.setdefault(tuple(contestants(m)), []).append(m)
    return found


def run(
    shapes: Sequence[tuple[int, int]],
    tokens: Sequence[int],
    json_file: Path | None,
    seconds: float,
) -> None:
    """Measures, prints a table and writes JSON; exits with INCOMPLETE where something is left."""
    card = this_card()
    end, begun = time.monotonic() + seconds, revision()
    rows: list[Row] = []
    left = [(n, k, m, name) for n, k in shapes for m in tokens for name in contestants(m)]
    with torch.inference_mode():
        for shape, m, found in measured(shapes, tokens, card.speed, end):
            rows += found
            timed = {(*shape, m, row.contestant) for row in found}
            left = [case for case in left if case not in timed]
            if json_file:
                result = {
                    **card.facts(),
                    "left_out": lines_of(left),
                    "rows": [dataclasses.asdict(row) for row in rows],
                }
                write_json(json_file, result, begun)
    print(table(rows))
    if left:
        print("left out:", *lines_of(left), sep="\n  ")
        sys.exit(INCOMPLETE)


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.choices",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK", default=SHAPES)
    parser.add_argument("--m", type=int, nargs="+", metavar="TOKENS", default=ALL_TOKENS)
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    with new_result(parser, arguments.json):
        run(arguments.shapes, arguments.m, arguments.json, arguments.seconds)


if __name__ == "__main__":
    main()
