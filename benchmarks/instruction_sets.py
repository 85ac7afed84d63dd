"""Times the kernels of lesser instruction sets against dense peers that are held to the same.

    python -m benchmarks.instruction_sets --json results.json
    python -m benchmarks.instruction_sets --shapes 4096x4096 4096x11008 --patterns 2:4 4:8

Each instruction set runs in a process of its own, because libraries read their limit once:
PERMLLM_CPU_ISA for our kernels, and for the peers ONEDNN_MAX_CPU_ISA, ATEN_CPU_CAPABILITY, and
MKL_ENABLE_INSTRUCTIONS or MKL_CBWR. One thread, in thread-CPU time, all contestants call by call in
turn.

The result is written after each instruction set; one that it holds for all shapes, patterns and
numbers of tokens is not measured again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.cpu.conditions import conditions, warn
from benchmarks.cpu.contestants import (
    VLLM_INT8,
    Call,
    Make,
    dense_contestants,
    median_times,
    peer_makers,
    rounds_of,
    sparse_contestant,
    vllm_primitive,
)
from benchmarks.cpu.products import activations
from benchmarks.pruning.commands import ended
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from benchmarks.shapes import TOKENS, VALUES, parse_shape, random_layer, to_int8
from permllm_vllm.backends.cpu import INT8_ONLY, CpuBackend

#: What holds a peer to the instruction set: oneDNN, PyTorch's own loops, and MKL. COMPATIBLE, which
#: is SSE2, holds MKL on every CPU. Above it MKL heeds a limit on Intel's CPUs alone, and chooses
#: itself on others; MKL_CBWR's AVX2 would only add what reproducible sums cost.
LIMITS = {
    "avx512_bf16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512_vbmi2": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512_vnni": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "avx2_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "portable": {
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_CBWR": "COMPATIBLE",
    },
}
TORCH, FLOAT32, VLLM = "torch", "torch float32", "vllm"
"""The dense contestants in bfloat16 and float32."""
KEY = ("isa", "n", "k", "pattern", "m", "value_dtype")
WITHOUT_INT8_PEER = ("avx2", "portable")
"""oneDNN multiplies int8 by plain loops there: 33 ms for one token, on Zen 5."""


@dataclass(frozen=True)
class Row:
    """One comparison; times are medians in microseconds, `ratio` is the bfloat16 peer / ours.

    Attributes:
        float32_us: a dense float32 weight, whose product is MKL's.
        vllm_us: vLLM's dense bfloat16 layer; None where oneDNN has no primitive for it.
        vllm_int8_us: vLLM's dense int8 layer (W8A8); None where it is no peer.
        fastest: the dense contestant with the least time, `torch`, `torch float32` or `vllm`.
        fastest_ratio: its time / ours.
    """

    n: int
    k: int
    m: int
    pattern: str
    value_dtype: str
    isa: str
    threads: int
    peer: str
    peer_us: float
    float32_us: float
    ours_us: float
    ratio: float
    vllm_us: float | None
    vllm_int8_us: float | None
    fastest: str
    fastest_ratio: float


def _bfloat16_linear(dense: Tensor) -> Call:
    weight = dense.clone()
    return lambda x: linear(x, weight)


def _float32_linear(dense: Tensor) -> Call:
    weight = dense.float()
    return lambda x: linear(x.float(), weight).bfloat16()


def measure(shape: tuple[int, int], tokens: list[int], pattern: str) -> list[Row]:
    """All rows of one shape, in a process that is held to an instruction set already."""
    n, k = shape
    isa = CpuBackend().instruction_set
    layer = random_layer(n, k, pattern, by_magnitude=True)
    makers: dict[str, Make] = {TORCH: _bfloat16_linear, FLOAT32: _float32_linear}
    vllm = vllm_primitive(layer.dense)
    if vllm is not None:
        makers[VLLM] = vllm
    int8_peer = None if isa in WITHOUT_INT8_PEER else peer_makers(int8=True).get(VLLM_INT8)
    peers = makers if int8_peer is None else {**makers, VLLM_INT8: int8_peer}
    contestants = dense_contestants(peers, layer.dense)
    own = [values for values in VALUES if values == "int8" or isa not in INT8_ONLY]
    for values in own:
        drawn = to_int8(layer) if values == "int8" else layer
        contestants[values] = sparse_contestant(values, drawn, CpuBackend())
    rows = []
    for m in tokens:
        times = median_times(contestants, activations(m, k), 1, rounds_of(m, quick=True))
        fastest = min(makers, key=lambda name: times[name])
        rows += [
            Row(
                n=n,
                k=k,
                m=m,
                pattern=pattern,
                value_dtype=values,
                isa=isa,
                threads=1,
                peer=TORCH,
                peer_us=round(times[TORCH], 1),
                float32_us=round(times[FLOAT32], 1),
                ours_us=round(times[values], 1),
                ratio=round(times[TORCH] / times[values], 3),
                vllm_us=round(times[VLLM], 1) if VLLM in times else None,
                vllm_int8_us=round(times[VLLM_INT8], 1) if VLLM_INT8 in times else None,
                fastest=fastest,
                fastest_ratio=round(times[fastest] / times[values], 3),
            )
            for values in own
        ]
    return rows


def lesser() -> list[str]:
    """The instruction sets that this CPU has beside its fastest one, fastest first.

    `zen5` is `avx512_bf16` with other constants, and no set beside it.
    """
    every: str = torch.ops.permllm.cpu_instruction_sets()
    names = every.split(",")
    same = {"zen5", "avx512_bf16"} if names[0] == "zen5" else {"zen5"}
    return [isa for isa in names[1:] if isa not in same]


def limited(isa: str) -> dict[str, str]:
    """The environment of a process whose peers and kernels are held to `isa`."""
    every = {name for limits in LIMITS.values() for name in limits}
    own = {name: value for name, value in os.environ.items() if name not in every}
    return {**own, **LIMITS[isa], "PERMLLM_CPU_ISA": isa, "OMP_NUM_THREADS": "1"}


def run_limited(isa: str, arguments: list[str]) -> list[Row]:
    """Measures in a fresh process whose peers and kernels are held to `isa`.

    Raises:
        RuntimeError: it failed; it has said why.
    """
    command = [sys.executable, "-m", "benchmarks.instruction_sets", "--here", *arguments]
    found = subprocess.run(command, env=limited(isa), stdout=subprocess.PIPE, text=True)
    if found.returncode:
        raise RuntimeError(ended(f"measuring {isa}", found.returncode))
    return [Row(**row) for row in json.loads(found.stdout.splitlines()[-1])]


def table(rows: list[Row]) -> Table:
    """One line per instruction set, values, shape, pattern and token count."""
    result = Table(title="one thread, microseconds; the peers are held to the instruction set")
    columns = (
        "instruction set",
        "values",
        "N x K",
        "pattern",
        "M",
        "dense bf16",
        "dense f32",
        "vLLM",
        "vLLM int8",
        "ours",
        "ratio",
        "to the fastest",
    )
    for column in columns:
        result.add_column(column, justify="right")
    for row in rows:
        times = (row.peer_us, row.float32_us, row.vllm_us, row.vllm_int8_us, row.ours_us)
        result.add_row(
            *(row.isa, row.value_dtype, f"{row.n}x{row.k}", row.pattern, str(row.m)),
            *("" if time is None else f"{time:.0f}" for time in times),
            *(f"{row.ratio:.2f}x", f"{row.fastest_ratio:.2f}x"),
        )
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.instruction_sets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--isa", nargs="+", choices=LIMITS, help="default: all of this CPU but its fastest one"
    )
    parser.add_argument(
        "--shapes", type=parse_shape, nargs="+", default=[(4096, 4096)], metavar="NxK"
    )
    parser.add_argument("--m", type=int, nargs="+", default=list(TOKENS), metavar="TOKENS")
    parser.add_argument("--patterns", nargs="+", choices=["2:4", "4:8"], default=["2:4"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are kept")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Measures every instruction set, prints a table, writes JSON."""
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.here:
        torch.set_num_threads(1)
        with torch.inference_mode():
            rows = [
                row
                for shape, pattern in itertools.product(arguments.shapes, arguments.patterns)
                for row in measure(shape, arguments.m, pattern)
            ]
        print(json.dumps([asdict(row) for row in rows]))
        return
    facts = {"limits": LIMITS}
    with kept_rows(parser, arguments.json, facts, KEY, growing=facts) as result:
        warn()
        failed = _run(arguments, result)
        columns = Row.__dataclass_fields__
        no_peer: Any = None  # as in older rows
        rows = [Row(**{c: row.get(c, no_peer) for c in columns}) for row in result.all()]
        Console().print(table(rows))
    if failed:
        sys.exit(f"benchmarks.instruction_sets: {'; '.join(failed)}")


def _run(arguments: argparse.Namespace, result: Rows) -> list[str]:
    """Measure the instruction sets that the result lacks; returns which of them failed, and how."""
    passed = ["--shapes", *(f"{n}x{k}" for n, k in arguments.shapes)]
    passed += ["--patterns", *arguments.patterns, "--m", *map(str, arguments.m)]
    cells = list(itertools.product(arguments.shapes, arguments.patterns, arguments.m))
    failed = []
    for isa in arguments.isa or lesser():
        # Every instruction set has a kernel of int8 values, some no other.
        if all((isa, *shape, pattern, m, "int8") in result for shape, pattern, m in cells):
            continue
        try:
            found = run_limited(isa, passed)
        except RuntimeError as error:
            failed.append(str(error))
            continue
        result.update({**asdict(row), **conditions()} for row in found)
    return failed


if __name__ == "__main__":
    main()
