"""Times the kernels on a GPU against the dense and sparse paths of PyTorch.

    python -m benchmarks.cuda.kernels --json results.json

Every contestant is captured in a CUDA graph that calls it in turn with copies of its weight, so
many that none of them is in the second-level cache when its turn comes again; activations are
copied as often, once for all contestants. A graph has 32 calls at least, and the GPU sleeps
while the host launches it. The graphs of all contestants are replayed in turns; numbers are
medians over replays. A result that is wrong is not timed. Our kernels and cuBLAS come first, for
some numbers of tokens on every shape, then for the others; then all over again beside the peers,
whose rows have the same turns as ours. Results, and what is missing, are written after each number
of tokens. Exits with a status of its own where something was left out. Needs PyTorch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda import INCOMPLETE
from benchmarks.cuda.card import this_card
from benchmarks.cuda.contestants import (
    CONTESTANTS,
    CUDA,
    DENSE,
    INT8,
    OWN,
    SPARSE_BYTES,
    WEIGHT_BYTES,
    Call,
    UnavailableError,
    maker,
    multiplied,
    on_gpu,
    with_values_of,
)
from benchmarks.cuda.rows import Case, Row, lines_of, missing, slower_than_dense, table
from benchmarks.cuda.turns import CaptureError, Turn, captured, first_line, medians
from benchmarks.records.machine import revision, write_json
from benchmarks.records.result_file import new_result
from benchmarks.shapes import LLAMA_2_7B, Layer, parse_shape, random_layer
from permllm_vllm.checkpoint import permutation as permutations

#: (outputs, inputs) of Llama-3-8B's linear layers as vLLM fuses them: qkv, o, gate_up, down.
LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SHAPES = tuple(dict.fromkeys((*LLAMA_2_7B, *LLAMA_3_8B)))
CORE = (1, 8, 16, 32, 64, 128, 512, 4096)
"""Numbers of tokens that come first."""
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
#: Of the permutation alone; 2048 x 4096 is the paper's (Table 3).
PERMUTED = tuple((tokens, k) for tokens in (1024, 2048, 4096) for k in (4096, 11008))
#: Of a result: rounding it to bfloat16 gives 1.7e-3, rounding of partial sums a little more. The
#: rounding of weights to int8 would be 9e-3, and is part of the weight that is compared with.
ERROR_LIMIT = 5e-3


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Calls with copies of one weight, and some rows of that weight, dense."""

    calls: Sequence[Call]
    outputs: slice
    dense: Tensor

    def checked_error(self, x: Tensor) -> float:
        """Of a call with `x [tokens, inputs]`; raises ValueError where it is above ERROR_LIMIT."""
        error = relative_error(self.calls[0](x)[:, self.outputs], x, self.dense)
        if not error <= ERROR_LIMIT:
            raise ValueError(f"its relative error is {error:.2e}, more than {ERROR_LIMIT}")
        return error


def copies(tensor_bytes: int) -> int:
    """Copies of a tensor that the cache cannot hold, and at least eight."""
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    return max(8, math.ceil(4 * cache / tensor_bytes))


def relative_error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Frobenius error against float64, over some tokens: `y [tokens, some outputs]` of those."""
    tokens = spread(len(x), 64)
    exact = x[tokens].double() @ dense.double().t()
    return float((y[tokens].double() - exact).norm() / exact.norm())


def spread(length: int, count: int) -> slice:
    """About so many places, evenly over a length, and at every place of a tile in turn."""
    return slice(None, None, length // count | 1)  # odd: tiles are powers of two


def prepared(layer: Layer, name: str) -> Contestant:
    """A contestant with as many copies of its weight as the cache does not hold."""
    n, k = layer.dense.shape
    layer, outputs = with_values_of(name, layer), spread(n, 512)
    calls = maker(name)(layer, copies(n * k // 2))
    return Contestant(calls, outputs, multiplied(name, layer)[outputs].clone())


def measure(
    layer: Layer, tokens: Sequence[int], names: list[str], speed: float
) -> Iterator[list[Row]]:
    """Times every contestant on one layer, in turns for each number of tokens; yields their rows.

    One that cannot run, or whose result is wrong, is left out, with a line why. One that runs on no
    shape, or cannot be captured, is taken from `names` too, and not tried again.
    """
    n, k = layer.dense.shape
    contestants: dict[str, Contestant] = {}
    for name in list(names):
        try:
            contestants[name] = prepared(layer, name)
        except UnavailableError as error:
            print(f"no {name}: {first_line(error)}")
            names.remove(name)
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            print(f"{n} x {k}: no {name}: {first_line(error)}")
    for m in tokens:
        x = torch.randn(m, k, device=CUDA).bfloat16()
        inputs: list[Tensor] = []  # of all contestants, until the last replay
        turns: dict[str, Turn] = {}
        errors: dict[str, float] = {}
        for name, contestant in list(contestants.items()):
            try:
                errors[name] = contestant.checked_error(x)
                inputs = inputs or [x.clone() for _ in contestant.calls]
                turns[name] = captured(contestant.calls, inputs)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{n} x {k}, {m} tokens: no {name}: {first_line(error)}")
                if isinstance(error, CaptureError):
                    del contestants[name]
                    names.remove(name)
        yield [
            Row(
                n=n,
                k=k,
                tokens=m,
                contestant=name,
                us=round(us, 2),
                floor_us=round(_bytes(name, n, k, m) / speed, 2),
                relative_error=float(f"{errors[name]:.2e}"),
            )
            for name, us in medians(turns, 5 if m > 1024 else 15).items()
        ]
        del turns, inputs  # the memory of graphs and activations
    del contestants
    torch.cuda.empty_cache()


def _bytes(name: str, n: int, k: int, tokens: int) -> float:
    """That a contestant must move at least: weight, activations and result."""
    bytes_of_weight = WEIGHT_BYTES.get(INT8 if name.endswith(", int8") else name, SPARSE_BYTES)
    return n * k * bytes_of_weight + 2 * tokens * (n + k)


def measure_permutation(tokens: int, k: int) -> dict[str, float]:
    """The permutation kernel against indexing with PyTorch, in microseconds.

    Each call reads other activations, which the cache has forgotten.
    """
    layer = random_layer(8, k)
    assert layer.weights.permutation is not None
    absolute = permutations.absolute(layer.weights.permutation, 64).to(CUDA)
    places = (absolute % 128).to(torch.uint8)
    inputs = [torch.randn(tokens, k, device=CUDA).bfloat16() for _ in range(copies(2 * tokens * k))]
    ours = [lambda x: torch.ops.permllm.permute_inputs(x, places)] * len(inputs)
    theirs = [lambda x: x[:, absolute]] * len(inputs)
    turns = {"permllm": captured(ours, inputs), "indexing": captured(theirs, inputs)}
    result = medians(turns, 15)
    return {"tokens": tokens, "k": k, **{name: round(us, 2) for name, us in result.items()}}


def passes(tokens: Sequence[int], names: Sequence[str]) -> list[tuple[list[int], list[str]]]:
    """Numbers of tokens and contestants of one round over all shapes after the other."""
    first = [name for name in names if name in (*OWN, DENSE)]
    core = [m for m in tokens if m in CORE]
    others = [m for m in tokens if m not in CORE]
    return [
        (some, group)
        for group in ([first, [*names]] if 0 < len(first) < len(names) else [[*names]])
        for some in (core, others)
        if some
    ]


def run(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    contestants: Sequence[str] | None = None,
    json_file: Path | None = None,
    seconds: float = 600,
) -> None:
    """Measures, begins nothing further after `seconds`, prints tables, writes JSON.

    Exits with INCOMPLETE where something was left out.
    """
    card = this_card()
    shapes, tokens = shapes or SHAPES, tokens or TOKENS
    # Our own and cuBLAS are captured before the peers, whatever becomes of those.
    names = [name for name in CONTESTANTS if not contestants or name in contestants]
    end, begun = time.monotonic() + seconds, revision()
    rows: dict[Case, Row] = {}
    tried: set[Case] = set()

    def left_out() -> list[str]:
        return lines_of(missing([*rows.values()], tried, shapes, tokens, names))

    def save() -> None:
        if json_file:
            result = {
                **card.facts(),
                "permutation": moves,
                "slower_than_dense": sorted(slower_than_dense([*rows.values()])),
                "left_out": left_out(),
                "rows": [dataclasses.asdict(row) for row in rows.values()],
            }
            write_json(json_file, result, begun)

    with torch.inference_mode():
        moves = [measure_permutation(m, k) for m, k in PERMUTED]
        save()
        for cases, found in _until(end, shapes, passes(tokens, names), card.speed):
            tried |= cases
            rows |= {row.case: row for row in found}
            save()
    for move in moves:
        ratio = move["indexing"] / move["permllm"]
        print(
            f"permuting {move['tokens']} x {move['k']}: {move['permllm']} us, indexing "
            f"{move['indexing']} us, {ratio:.1f}x"
        )
    print(table([*rows.values()]))
    if left_out():
        print("left out:", *left_out(), sep="\n  ")
        sys.exit(INCOMPLETE)


def _until(
    end: float,
    shapes: Sequence[tuple[int, int]],
    rounds: Sequence[tuple[list[int], list[str]]],
    speed: float,
) -> Iterator[tuple[set[Case], list[Row]]]:
    """What was tried, and the rows; nothing is begun after `end`, a time of `time.monotonic`."""
    layers: dict[tuple[int, int], Layer] = {}  # the host takes a second to pack one
    lost: set[str] = set()
    for tokens, names in rounds:
        for shape in shapes:
            if time.monotonic() >= end:
                return
            if shape not in layers:
                layers[shape] = on_gpu(random_layer(*shape, drawn_on=CUDA))
            kept = [name for name in names if name not in lost]
            for found, m in zip(measure(layers[shape], tokens, kept, speed), tokens, strict=True):
                yield {(*shape, m, name) for name in names}, found
                if time.monotonic() > end:
                    return
            lost |= {*names} - {*kept}


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.kernels", description=__doc__)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS)
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    with new_result(parser, arguments.json):
        run(arguments.shapes, arguments.m, arguments.contestants, arguments.json, arguments.seconds)


if __name__ == "__main__":
    main()
