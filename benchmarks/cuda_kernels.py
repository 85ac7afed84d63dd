"""Times the kernels on a GPU against the dense and sparse paths of PyTorch.

    python -m benchmarks.cuda_kernels --json results.json

Every contestant is captured in a CUDA graph that calls it in turn with copies of its weight, so
many that none of them is in the second-level cache when its turn comes again. Numbers are medians
over replays. Needs PyTorch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import write_json
from benchmarks.shapes import LLAMA_2_7B, Layer, random_layer
from permllm_vllm import ops
from permllm_vllm.backends import fallback_reason
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint import permutation as permutations

#: (outputs, inputs) of Llama-3-8B's linear layers as vLLM fuses them: qkv, o, gate_up, down.
LLAMA_3_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
SHAPES = tuple(dict.fromkeys((*LLAMA_2_7B, *LLAMA_3_8B)))
TOKENS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
OURS = "permllm"
UNPERMUTED = "permllm, no permutation"
DENSE = "cublas"
CUDA = torch.device("cuda")
Call = Callable[[Tensor], Tensor]


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


def time_graph(calls: Sequence[Call], x: Tensor, repeats: int) -> float:
    """Median microseconds of one call, of graphs that make each of `calls` once, in turn."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call(x)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(weight_bytes: int) -> int:
    """Copies of a weight that the cache cannot hold, and at least eight calls per graph."""
    cache = torch.cuda.get_device_properties(CUDA).L2_cache_size
    return max(8, math.ceil(4 * cache / weight_bytes))


def bandwidth() -> float:
    """Bytes per microsecond of a copy of 1 GiB, reading and writing counted."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    us = time_graph([lambda x: target.copy_(x)] * 2, source, 10)
    return 2 * source.numel() / us


def _dense(layer: Layer) -> Call:
    weight = layer.dense.to(CUDA)
    return lambda x: torch.nn.functional.linear(x, weight)


def _ours(layer: Layer, *, permuted: bool) -> Call:
    weights = layer.weights
    changes: dict[str, Any] = {
        name: value.to(CUDA) for name, value in vars(weights).items() if torch.is_tensor(value)
    }
    if not permuted:
        changes["permutation"] = None
    packed = CudaBackend(torch.bfloat16).pack(dataclasses.replace(weights, **changes))
    n = layer.dense.shape[0]
    return lambda x: ops.sparse_linear(
        x, packed.packed, packed.metadata, packed.permutation, None, None, n, "2:4"
    )


def _permuted_dense(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weight with zeros in permuted order, and the permutation in blocks of 128."""
    weights = layer.weights
    assert weights.permutation is not None
    dense = permutations.permute_columns(layer.dense, weights.permutation, weights.block_size)
    places = permutations.absolute(weights.permutation, weights.block_size) % 128
    return dense.to(CUDA), places.to(CUDA, torch.uint8)


def _cusparselt(layer: Layer) -> Call:
    """cuSPARSELt with its fastest algorithm for 16 tokens, after our permutation kernel."""
    dense, places = _permuted_dense(layer)
    compressed = torch._cslt_compress(dense)
    probe = torch.zeros(16, dense.shape[1], dtype=dense.dtype, device=CUDA)
    algorithm = torch._cslt_sparse_mm_search(compressed, probe.t())

    def call(x: Tensor) -> Tensor:
        permuted = torch.ops.permllm.permute_inputs(x, places)
        padding = -x.shape[0] % 8  # its tokens come in eights
        if padding:
            permuted = torch.nn.functional.pad(permuted, (0, 0, 0, padding))
        y = torch._cslt_sparse_mm(compressed, permuted.t(), alg_id=algorithm, transpose_result=True)
        return y[: x.shape[0]]

    return call


def _semi_structured(layer: Layer) -> Call:
    """PyTorch's own CUTLASS path (sm_80), after our permutation kernel."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS, to_sparse_semi_structured

    dense, places = _permuted_dense(layer)
    SparseSemiStructuredTensorCUTLASS._FORCE_CUTLASS = True
    weight = to_sparse_semi_structured(dense)
    return lambda x: torch.nn.functional.linear(torch.ops.permllm.permute_inputs(x, places), weight)


CONTESTANTS: dict[str, Callable[[Layer], Call]] = {
    OURS: lambda layer: _ours(layer, permuted=True),
    UNPERMUTED: lambda layer: _ours(layer, permuted=False),
    DENSE: _dense,
    "permute + cusparselt": _cusparselt,
    "permute + pytorch cutlass": _semi_structured,
}


def relative_error(y: Tensor, x: Tensor, dense: Tensor) -> float:
    """Frobenius error against float64, over the first rows and tokens."""
    exact = x[:64].double() @ dense[:512].to(CUDA).double().t()
    return float((y[:64, :512].double() - exact).norm() / exact.norm())


def measure(n: int, k: int, tokens: list[int], names: list[str], speed: float) -> Iterator[Row]:
    """Times every contestant on one shape; one that cannot run is left out, with a line why."""
    layer = random_layer(n, k)
    for name in names:
        try:
            calls = [CONTESTANTS[name](layer) for _ in range(copies(n * k))]
        except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
            print(f"{n} x {k}: no {name}: {_first_line(error)}")
            continue
        for m in tokens:
            x = torch.randn(m, k, device=CUDA).bfloat16()
            weight_bytes = n * k * 2 if name == DENSE else n * k * 9 // 8
            try:
                error_now = relative_error(calls[0](x), x, layer.dense)
                us = time_graph(calls, x, 5 if m > 1024 else 15)
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{n} x {k}, {m} tokens: no {name}: {_first_line(error)}")
                continue
            yield Row(
                n=n,
                k=k,
                tokens=m,
                contestant=name,
                us=round(us, 2),
                floor_us=round((weight_bytes + 2 * m * (n + k)) / speed, 2),
                relative_error=float(f"{error_now:.2e}"),
            )
        del calls
        torch.cuda.empty_cache()


def measure_permutation(tokens: int, k: int) -> dict[str, float]:
    """The permutation kernel against indexing with PyTorch, in microseconds."""
    layer = random_layer(8, k)
    assert layer.weights.permutation is not None
    absolute = permutations.absolute(layer.weights.permutation, 64).to(CUDA)
    places = (absolute % 128).to(torch.uint8)
    inputs = [torch.randn(tokens, k, device=CUDA).bfloat16() for _ in range(4)]
    x = inputs[0]
    ours = [lambda _, y=y: torch.ops.permllm.permute_inputs(y, places) for y in inputs]
    theirs = [lambda _, y=y: y[:, absolute] for y in inputs]
    result = {"permllm": time_graph(ours, x, 15), "indexing": time_graph(theirs, x, 15)}
    return {"tokens": tokens, "k": k, **{name: round(us, 2) for name, us in result.items()}}


def table(rows: list[Row]) -> str:
    """A line per shape and number of tokens: times, and what the others take of ours."""
    names = list(dict.fromkeys(row.contestant for row in rows))
    lines = ["  ".join([f"{'n x k':>12}", f"{'tokens':>6}", *(f"{name:>25}" for name in names)])]
    for (n, k, m), group in itertools.groupby(
        sorted(rows, key=lambda row: (row.n, row.k, row.tokens)),
        key=lambda row: (row.n, row.k, row.tokens),
    ):
        found = {row.contestant: row for row in group}
        ours = found.get(OURS)
        cells = []
        for name in names:
            row = found.get(name)
            if row is None or ours is None:
                cells.append(f"{'-':>25}")
            elif name == OURS:
                cells.append(f"{row.us:>10.1f} us {row.floor_us / row.us:>5.0%} floor")
            else:
                cells.append(f"{row.us:>14.1f} us {row.us / ours.us:>6.2f}x")
        lines.append("  ".join([f"{f'{n} x {k}':>12}", f"{m:>6}", *cells]))
    return "\n".join(lines)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def shape(text: str) -> tuple[int, int]:
    """Reads 12288x4096."""
    n, _, k = text.partition("x")
    return int(n), int(k)


def main() -> None:
    """Measures, prints a table, writes JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda_kernels", description=__doc__)
    parser.add_argument("--shapes", type=shape, nargs="+", default=list(SHAPES), metavar="NxK")
    parser.add_argument("--m", type=int, nargs="+", default=list(TOKENS), metavar="TOKENS")
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    reason = fallback_reason(CUDA, torch.bfloat16)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    speed = bandwidth()
    gpu = torch.cuda.get_device_name(CUDA)
    print(f"{gpu}, a copy moves {speed / 1e3:.0f} GB/s, bfloat16")
    rows: list[Row] = []
    with torch.inference_mode():
        for n, k in arguments.shapes:
            rows += measure(n, k, arguments.m, arguments.contestants, speed)
        moves = [measure_permutation(m, k) for m in (1024, 4096) for k in (4096, 11008)]
    if arguments.json:
        write_json(
            arguments.json,
            {
                "gpu": gpu,
                "cuda": torch.version.cuda,
                "copy_gb_per_s": round(speed / 1e3),
                "rows": [dataclasses.asdict(row) for row in rows],
                "permutation": moves,
            },
        )
    for move in moves:
        ratio = move["indexing"] / move["permllm"]
        print(
            f"permuting {move['tokens']} x {move['k']}: {move['permllm']} us, indexing "
            f"{move['indexing']} us, {ratio:.1f}x"
        )
    print(table(rows))


if __name__ == "__main__":
    main()
