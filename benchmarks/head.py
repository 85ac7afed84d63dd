"""Times the kernel of the dense output head against vLLM's own path and PyTorch's.

    python -m benchmarks.head --threads 1 --json results.json
    python -m benchmarks.head --dtype float16 --json float16.json
    python -m benchmarks.head --values int8 --json int8.json
    python -m benchmarks.head --shapes 32000x2048 --tokens 1 8 --quick    # something small

Shapes are vocabulary x inputs, by default those of four models. Tokens are those that our kernels
take: more are multiplied by vLLM's path with the plugin too. Our weights lie in huge pages as the
plugin creates them, in 12 bits a value where kernels read that, or rounded to int8 as its option
"head" does, and the peers' as theirs come;
contestants are called in turn, over copies of the weight that no cache holds. One thread is timed
in thread-CPU time, more of them in wall time; numbers are medians.

The result is written after each number of tokens; one that it holds is not measured again.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import Module, Parameter

from benchmarks.cpu.conditions import conditions, warn
from benchmarks.cpu.contestants import (
    Call,
    Contestant,
    dense_contestants,
    median_times,
    peer_makers,
    rounds_of,
)
from benchmarks.cpu.products import LIMITS, activations
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from benchmarks.shapes import HEADS, parse_shape
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import PackedWeights
from permllm_vllm.quantization.head import HeadMethod, copied_tokens, head_tokens

TOKENS = (1, 2, 3, 4, 5, 8, 16, 32, 64)
"""Measured as far as the kernel takes them. That of AVX-512 multiplies 1, 2, 4, 6 or 8; 3 and 5 are
those that it fills up with the most zeros."""
INPUTS = 32
"""The kernel takes multiples of so many; other weights are PyTorch's."""
DTYPES = ("bfloat16", "float16")
VALUES = ("kept", "int8")
"""The weight as it is, or rounded."""
OLDER = {"dtype": "bfloat16", "values": "kept"}
"""Of results that do not say it."""
OURS = "permllm"
KEY = ("n", "k", "m", "peer")


@dataclass(frozen=True)
class Row:
    """One comparison with one peer; times are medians in microseconds, `ratio` is peer / ours.

    Attributes:
        gigabytes_per_second: at which our kernel reads the weight, in units of 1e9 bytes.
        relative_error: of our kernel; Frobenius, against float64.
        load_average, small_pages: of `benchmarks.cpu.conditions`.
    """

    n: int
    k: int
    m: int
    isa: str
    threads: int
    peer: str
    peer_us: float
    ours_us: float
    ratio: float
    gigabytes_per_second: float
    relative_error: float
    load_average: float
    small_pages: float | None = None


def most_tokens(shape: tuple[int, int], dtype: str, values: str = "kept") -> int:
    """Tokens that the kernels take with such a weight; ends the program where there is none."""
    if ops.missing_reason:
        sys.exit(f"benchmarks.head: the compiled kernels are missing: {ops.missing_reason}")
    most = int(torch.ops.permllm.cpu_head_tokens(*shape, dtype == "float16"))
    packed = packed_head(random_head(64, shape[1], getattr(torch, dtype)), values)
    if packed is not None:
        return max(most, *TOKENS)
    if not most:
        needed = (
            "AVX2"
            if values == "int8"
            else "AVX-512 BF16 (float16: without AMX), or with AVX2 and no AVX-512 (outputs in a "
            "multiple of 8, inputs of 64)"
        )
        sys.exit(
            f"benchmarks.head: {CpuBackend().instruction_set} has no kernel for a head of {dtype}, "
            f"values {values}, so vLLM's own path serves and there is nothing to compare: measure "
            f"on a CPU with {needed}, without PERMLLM_CPU_ISA"
        )
    return most


def packed_head(dense: Tensor, values: str) -> PackedWeights | None:
    """The copy that the plugin makes, None where it has the weight alone."""
    backend = CpuBackend()
    return backend.round_dense(dense) if values == "int8" else backend.pack_dense(dense)


def head_linear(dense: Tensor, values: str = "kept") -> Call:
    """Our kernels on one copy of the weight, as the plugin keeps it and chooses between them."""
    layer = Module()
    layer.weight = Parameter(dense, requires_grad=False)
    method = HeadMethod(rounded=values == "int8")
    method.adopt(layer)
    return partial(method.apply, layer)


def random_head(n: int, k: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A weight `[n, k]`."""
    generator = torch.Generator().manual_seed(n + k)
    return torch.randn(n, k, generator=generator).mul_(k**-0.5).to(dtype)


def measure(
    shape: tuple[int, int],
    tokens: Sequence[int],
    threads: int,
    quick: bool,
    dtype: torch.dtype = torch.bfloat16,
    values: str = "kept",
) -> Iterator[list[Row]]:
    """Compare one head with every peer; yields the rows of one number of tokens at a time.

    Raises:
        WrongProduct: a contestant multiplies by something else.
    """
    (n, k), dense = shape, random_head(*shape, dtype)
    packed = packed_head(dense, values)
    copy_bytes = dense.nbytes if packed is None else packed.packed.nbytes
    del packed
    peers = peer_makers(int8=False)
    contestants = dense_contestants(peers, dense)
    limit = LIMITS["int8" if values == "int8" else "bfloat16"]
    ours = partial(head_linear, dense, values)
    contestants[OURS] = Contestant(OURS, copy_bytes, ours, dense, limit, dtype)
    contestants[OURS].warm()
    for m in tokens:
        x = activations(m, k, dtype)
        times = median_times(contestants, x, threads, rounds_of(m, quick))
        own_time, error = times[OURS], contestants[OURS].checked(x)
        in_place = values != "int8" and copied_tokens(dense) < m <= head_tokens(dense)
        weight_bytes = dense.nbytes if in_place else copy_bytes
        yield [
            Row(
                n=n,
                k=k,
                m=m,
                isa=CpuBackend().instruction_set,
                threads=threads,
                peer=peer,
                peer_us=round(times[peer], 1),
                ours_us=round(own_time, 1),
                ratio=round(times[peer] / own_time, 3),
                gigabytes_per_second=round(weight_bytes / own_time / 1e3, 1),
                relative_error=float(f"{error:.2e}"),
                **conditions(),
            )
            for peer in peers
        ]


def table(rows: Sequence[Row]) -> Table:
    """One line per shape, number of tokens and peer."""
    result = Table(title=f"{rows[0].isa}, {rows[0].threads} thread(s), times in microseconds")
    for column in ("N x K", "M", "peer", "peer's", "permllm", "ratio", "GB/s"):
        result.add_column(column, justify="right")
    for row in rows:
        result.add_row(
            *(f"{row.n}x{row.k}", str(row.m), row.peer, f"{row.peer_us:.0f}"),
            *(f"{row.ours_us:.0f}", f"{row.ratio:.2f}x", f"{row.gigabytes_per_second:.1f}"),
        )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", metavar="NxK", default=list(HEADS.values())
    )
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=f"default: {DTYPES[0]}")
    parser.add_argument(
        "--values", choices=VALUES, default=VALUES[0], help="of our copy (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="where the rows are kept, of one thread count, dtype and values",
    )
    return parser


def _checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; ends the command where the kernel does not take them."""
    arguments = parser.parse_args()
    for n, k in arguments.shapes:
        if k % INPUTS:
            parser.error(f"--shapes {n}x{k}: the kernel takes a multiple of {INPUTS} inputs")
        most = most_tokens((n, k), arguments.dtype, arguments.values)
        for m in arguments.tokens or []:
            if not 1 <= m <= most:
                parser.error(
                    f"--tokens {m}: the kernel takes 1 to {most} of {k} inputs, vLLM's path more"
                )
    return arguments


def _run(arguments: argparse.Namespace, result: Rows) -> None:
    """Measure what the result lacks."""
    dtype = getattr(torch, arguments.dtype)
    with torch.inference_mode():
        for shape in arguments.shapes:
            there = {(row["n"], row["k"], row["m"]) for row in result.all()}
            most = most_tokens(shape, arguments.dtype, arguments.values)
            asked = arguments.tokens or [m for m in TOKENS if m <= most]
            tokens = [m for m in asked if (*shape, m) not in there]
            if tokens:
                for rows in measure(
                    shape, tokens, arguments.threads, arguments.quick, dtype, arguments.values
                ):
                    result.update(asdict(row) for row in rows)


def main() -> None:
    """Measures what the result lacks, prints a table, writes JSON."""
    parser = _parser()
    arguments = _checked(parser)
    torch.set_num_threads(arguments.threads)
    facts = {
        "isa": CpuBackend().instruction_set,
        "threads": arguments.threads,
        "dtype": arguments.dtype,
        "values": arguments.values,
        "rounds": rounds_of(1, arguments.quick),
    }
    columns = Row.__dataclass_fields__
    with kept_rows(parser, arguments.json, facts, KEY, OLDER) as result:
        warn()
        _run(arguments, result)
        found = [{c: row[c] for c in columns if c in row} for row in result.all()]
        Console().print(table([Row(**row) for row in found]))


if __name__ == "__main__":
    main()
