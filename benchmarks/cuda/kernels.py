"""Times the sparse product on a GPU against the dense and sparse paths of PyTorch.

    python -m benchmarks.cuda.kernels --json results.json

Every contestant is captured in a CUDA graph that calls it in turn with copies of its weight, so
many that none of them is in the second-level cache when its turn comes again; activations are
copied as often. The graphs of all contestants are replayed in turns; numbers are medians over
replays. A contestant that cannot run, or whose result is wrong, is left out with a line why, and
the command fails where that is one of this project. The permutation alone is timed against
indexing. The result is written after each number of tokens. Needs PyTorch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda.turns import Call, Turn, captured, medians
from benchmarks.records.machine import revision, write_json
from benchmarks.records.result_file import new_result
from benchmarks.shapes import LLAMA_2_7B, Layer, parse_shape, random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import PackedWeights, fallback_reason
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint import permutation as permutations

CUDA = torch.device("cuda")
TOKENS = (1, 8, 16, 32, 64, 128, 512, 4096)
#: Of the permutation alone; 2048 x 4096 is the paper's (Table 3).
PERMUTED = ((2048, 4096), (4096, 11008))
#: Of a result: rounding it to bfloat16 gives 1.7e-3, rounding of partial sums a little more.
ERROR_LIMIT = 5e-3
OURS, UNPERMUTED, INT8, DENSE = "permllm", "permllm, no permutation", "permllm, int8", "cublas"
OWN = (OURS, UNPERMUTED, INT8)
WEIGHT_BYTES = {DENSE: 2.0, INT8: 0.625}  # per weight; of the others:
SPARSE_BYTES = 1.125


@dataclasses.dataclass(frozen=True)
class Contestant:
    """Calls with copies of one weight, and that weight, dense, in the order of its inputs."""

    calls: list[Call]
    dense: Tensor


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant on one shape; times are medians in microseconds."""

    n: int
    k: int
    tokens: int
    contestant: str
    us: float
    floor_us: float
    """Bytes of weight, activations and result over the measured bandwidth of a copy."""
    relative_error: float


def dense(layer: Layer, count: int) -> Contestant:
    """PyTorch's own product."""
    copies_of = [layer.dense.clone() for _ in range(count)]

    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, weight)

    return Contestant([call(weight) for weight in copies_of], layer.dense)


def ours(layer: Layer, count: int) -> Contestant:
    """The operator, as models call it."""
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    rows = layer.dense.shape[0]

    def call(copy: PackedWeights) -> Call:
        return lambda x: ops.sparse_linear(
            x, copy.packed, copy.metadata, copy.permutation, copy.scale, None, rows, "2:4"
        )

    return Contestant([call(_on_gpu(packed)) for _ in range(count)], layer.dense)


def unpermuted(layer: Layer, count: int) -> Contestant:
    """The operator where the permutation is folded into the layer before."""
    weights = dataclasses.replace(layer.weights, permutation=None)
    return ours(Layer(weights, _permuted_dense(layer), layer.bias), count)


def cusparselt(layer: Layer, count: int) -> Contestant:
    """cuSPARSELt, after our permutation kernel, with the algorithm that its search finds."""
    compressed = torch._cslt_compress(_permuted_dense(layer).to(CUDA))
    places = _places(layer)
    found: dict[int, int] = {}

    def call(weight: Tensor) -> Call:
        def multiply(x: Tensor) -> Tensor:
            permuted = torch.ops.permllm.permute_inputs(x, places)
            padded = torch.nn.functional.pad(permuted, (0, 0, 0, -len(x) % 8))  # come in eights
            if len(x) not in found:  # measures: before it is captured
                found[len(x)] = torch._cslt_sparse_mm_search(weight, padded.t())
            y = torch._cslt_sparse_mm(
                weight, padded.t(), transpose_result=True, alg_id=found[len(x)]
            )
            return y[: len(x)]

        return multiply

    return Contestant([call(compressed.clone()) for _ in range(count)], layer.dense)


CONTESTANTS: dict[str, Callable[[Layer, int], Contestant]] = {
    OURS: ours,
    UNPERMUTED: unpermuted,
    INT8: lambda layer, count: ours(to_int8(layer), count),
    DENSE: dense,
    "permute + cusparselt": cusparselt,
}


def _on_gpu(packed: PackedWeights) -> PackedWeights:
    """A copy there."""
    changed: dict[str, Any] = {
        name: value.to(CUDA, copy=True)
        for name, value in vars(packed).items()
        if torch.is_tensor(value)
    }
    return dataclasses.replace(packed, **changed)


def _places(layer: Layer) -> Tensor:
    """The permutation, local to blocks of 128."""
    weights = layer.weights
    assert weights.permutation is not None
    places = permutations.absolute(weights.permutation, weights.block_size) % 128
    return places.to(CUDA, torch.uint8)


def _permuted_dense(layer: Layer) -> Tensor:
    weights = layer.weights
    assert weights.permutation is not None
    return permutations.permute_columns(layer.dense, weights.permutation, weights.block_size)


def copies(tensor_bytes: int) -> int:
    """Copies of a tensor that the cache cannot hold, and at least eight."""
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    return max(8, math.ceil(4 * cache / tensor_bytes))


def relative_error(y: Tensor, x: Tensor, weight: Tensor) -> float:
    """Frobenius error against float64, over some tokens and outputs, of every place in a tile."""
    tokens, outputs = (
        slice(None, None, length // count | 1)
        for length, count in ((len(x), 64), (len(weight), 512))
    )
    exact = x[tokens].double() @ weight[outputs].to(x.device).double().t()
    return float((y[tokens, outputs].double() - exact).norm() / exact.norm())


def measure(
    shape: tuple[int, int], tokens: Sequence[int], names: Sequence[str], speed: float
) -> Iterator[tuple[list[Row], list[str]]]:
    """Times every contestant on one layer, in turns for each number of tokens.

    Yields their rows, and those that could not run or were wrong, which have a line why.
    """
    n, k = shape
    layer = random_layer(n, k, drawn_on=CUDA)
    contestants: dict[str, Contestant] = {}
    lost: list[str] = []

    def leave_out(name: str, error: Exception) -> None:
        print(f"{n} x {k}: no {name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
        contestants.pop(name, None)
        lost.append(name)

    for name in names:
        try:
            contestants[name] = CONTESTANTS[name](layer, copies(n * k // 2))
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            leave_out(name, error)
    for m in tokens:
        x = torch.randn(m, k, device=CUDA).bfloat16()
        inputs = [x.clone() for _ in range(copies(n * k // 2))]  # until the last replay
        turns: dict[str, Turn] = {}
        errors: dict[str, float] = {}
        for name, contestant in list(contestants.items()):
            try:
                errors[name] = relative_error(contestant.calls[0](x), x, contestant.dense)
                if not errors[name] <= ERROR_LIMIT:
                    raise ValueError(f"its relative error is {errors[name]:.2e} with {m} tokens")
                turns[name] = captured(contestant.calls, inputs)
            except (RuntimeError, ValueError) as error:
                leave_out(name, error)
        moved = {
            name: n * k * WEIGHT_BYTES.get(name, SPARSE_BYTES) + 2 * m * (n + k) for name in turns
        }
        times = medians(turns, 5 if m > 1024 else 15)
        yield (
            [
                Row(
                    n, k, m, name, round(us, 2), round(moved[name] / speed, 2),
                    float(f"{errors[name]:.2e}"),
                )
                for name, us in times.items()
            ],
            lost,
        )  # fmt: skip


def measure_permutation(tokens: int, k: int) -> dict[str, float]:
    """The permutation kernel against indexing with PyTorch, in microseconds."""
    layer = random_layer(8, k)
    places = _places(layer)
    absolute = places.long() + torch.arange(k, device=CUDA) // 128 * 128
    inputs = [torch.randn(tokens, k, device=CUDA).bfloat16() for _ in range(copies(2 * tokens * k))]
    turns = {
        "permllm": captured(
            [lambda x: torch.ops.permllm.permute_inputs(x, places)] * len(inputs), inputs
        ),
        "indexing": captured([lambda x: x[:, absolute]] * len(inputs), inputs),
    }
    result = medians(turns, 15)
    return {"tokens": tokens, "k": k, **{name: round(us, 2) for name, us in result.items()}}


def bandwidth() -> float:
    """Bytes per microsecond of a copy of 1 GiB, reading and writing counted."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    copy = captured([lambda x: target.copy_(x)] * 2, [source])
    return 2 * source.numel() / medians({"copy": copy}, 10)["copy"]


def table(rows: Sequence[Row]) -> str:
    """A line per shape and number of tokens: times, and what the others take of ours."""
    names = list(dict.fromkeys(row.contestant for row in rows))
    lines = ["  ".join([f"{'n x k':>13}", f"{'tokens':>6}", *(f"{name:>24}" for name in names)])]
    for n, k, m in dict.fromkeys((row.n, row.k, row.tokens) for row in rows):
        found = {row.contestant: row for row in rows if (row.n, row.k, row.tokens) == (n, k, m)}
        cells = []
        for name in names:
            row, own = found.get(name), found.get(OURS)
            if row is None or own is None:
                cells.append("-")
            elif name == OURS:
                cells.append(f"{row.us:.1f} us {row.floor_us / row.us:.0%} floor")
            else:
                cells.append(f"{row.us:.1f} us {row.us / own.us:.2f}x")
        lines.append(
            "  ".join([f"{f'{n} x {k}':>13}", f"{m:>6}", *(f"{cell:>24}" for cell in cells)])
        )
    return "\n".join(lines)


def run(
    shapes: Sequence[tuple[int, int]] | None = None,
    tokens: Sequence[int] | None = None,
    json_file: Path | None = None,
) -> None:
    """Measures, prints tables, writes JSON; fails where a contestant of this project did.

    Raises:
        SystemExit: the kernels do not run here, or one of them was wrong.
    """
    reason = fallback_reason(CUDA, torch.bfloat16)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    begun, speed = revision(), bandwidth()
    facts = {
        "gpu": torch.cuda.get_device_name(CUDA),
        "cuda": torch.version.cuda,
        "copy_gb_per_s": round(speed / 1e3),
    }
    rows: list[Row] = []
    lost: set[str] = set()
    with torch.inference_mode():
        moves = [measure_permutation(*shape) for shape in PERMUTED]
        print(facts, *moves, sep="\n", flush=True)
        for shape in shapes or LLAMA_2_7B:
            for found, left_out in measure(shape, tokens or TOKENS, [*CONTESTANTS], speed):
                rows += found
                lost |= {*left_out}
                if json_file:
                    written = [dataclasses.asdict(row) for row in rows]
                    write_json(json_file, {**facts, "permutation": moves, "rows": written}, begun)
            print(table([row for row in rows if (row.n, row.k) == shape]), flush=True)
    if wrong := [name for name in OWN if name in lost]:
        sys.exit(f"left out, see above: {', '.join(wrong)}")


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda.kernels", description=__doc__)
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK")
    parser.add_argument("--tokens", "--m", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    with new_result(parser, arguments.json):
        run(arguments.shapes, arguments.tokens, arguments.json)


if __name__ == "__main__":
    main()
