"""Time and memory of packing the linear layers of Llama-2-7B for the CPU kernels.

    python -m benchmarks.packing --threads 1 --json OUT
    python -m benchmarks.packing --shapes 64x128 --decoder-layers 2     # something small

What vLLM does after loading, layer by layer: the tensors of a checkpoint, here random ones, become
packed blocks and are freed. The packed blocks are freed too, or the machine would have to hold the
model. Seconds are those of all decoder layers. The peak is the growth of the resident memory while
a layer is loaded and packed: its tensors, its packed blocks, and whatever else packing needs.

The result is written after each shape; one that it holds is not measured again.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.records.result_file import kept_rows
from benchmarks.resident_memory import ResidentGrowth
from benchmarks.shapes import LLAMA_2_7B, VALUES, parse_shape
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint.pattern import Pattern

DECODER_LAYERS = 32
BLOCK = 64
KEY = ("n", "k", "value_dtype")
OLDER = {"decoder_layers": DECODER_LAYERS}
"""Of results that do not say it."""
KEPT = torch.tensor([0b0011, 0b0101, 0b0110, 0b1001, 0b1010, 0b1100], dtype=torch.uint8)


@dataclass(frozen=True)
class Row:
    """Packing of one linear layer in every decoder layer; bytes are those of one.

    `peak_bytes` is None where the system does not let a process reset its peak.
    """

    n: int
    k: int
    value_dtype: str
    layers: int
    seconds: float
    cpu_seconds: float
    tensor_bytes: int
    packed_bytes: int
    peak_bytes: int | None


def random_weights(n: int, k: int, values: str) -> CheckpointWeights:
    """A layer as a 2:4 checkpoint holds it; its values are normal, or any integers."""
    generator = torch.Generator().manual_seed(n + k)
    shape = (n, k // 2)

    def nibbles() -> Tensor:
        return KEPT[torch.randint(len(KEPT), (n, k // 8), generator=generator)]

    if values == "int8":
        kept = torch.empty(shape, dtype=torch.int8).random_(-127, 128, generator=generator)
    else:
        kept = torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)
    return CheckpointWeights(
        values=kept,
        mask=nibbles() | nibbles() << 4,
        permutation=torch.rand(k // BLOCK, BLOCK, generator=generator)
        .argsort(-1)
        .flatten()
        .to(torch.uint8),
        scale=torch.ones(n) if values == "int8" else None,
        pattern=Pattern(2, 4),
        block_size=BLOCK,
    )


def _bytes(weights: CheckpointWeights) -> int:
    tensors = (value for value in vars(weights).values() if isinstance(value, Tensor))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def measure(n: int, k: int, values: str, layers: int) -> Row:
    """Pack a layer of this shape as often as the model has one."""
    backend, drawn = CpuBackend(), random_weights(n, k, values)
    seconds = cpu_seconds = 0.0
    packed_bytes = 0
    peaks: list[int] = []
    for _ in range(layers):
        growth = ResidentGrowth()
        loaded = copy.deepcopy(drawn)
        started, cpu_started = time.perf_counter(), time.process_time()
        packed = backend.pack(loaded)
        seconds += time.perf_counter() - started
        cpu_seconds += time.process_time() - cpu_started
        if (peak := growth.peak_bytes()) is not None:
            peaks.append(peak)
        packed_bytes = packed.packed.numel()
        del loaded, packed
    return Row(
        n=n,
        k=k,
        value_dtype=values,
        layers=layers,
        seconds=round(seconds, 3),
        cpu_seconds=round(cpu_seconds, 3),
        tensor_bytes=_bytes(drawn),
        packed_bytes=packed_bytes,
        peak_bytes=max(peaks, default=None),
    )


def table(rows: Sequence[Row]) -> Table:
    """What was measured, a line per layer, with the sum of all."""
    shown = Table("N x K", "values", "layers", "seconds", "CPU seconds", "packed MiB", "peak MiB")
    for row in rows:
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}"
        shown.add_row(
            f"{row.n} x {row.k}", row.value_dtype, str(row.layers), f"{row.seconds:.2f}",
            f"{row.cpu_seconds:.2f}", f"{row.packed_bytes / 2**20:.1f}", peak,
        )  # fmt: skip
    for values in dict.fromkeys(row.value_dtype for row in rows):
        of_values = [row for row in rows if row.value_dtype == values]
        packed = sum(row.packed_bytes * row.layers for row in of_values) / 2**20
        shown.add_row(
            "all", values, "", f"{sum(row.seconds for row in of_values):.2f}",
            f"{sum(row.cpu_seconds for row in of_values):.2f}", f"{packed:.1f}", "",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packing",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--shapes", type=parse_shape, nargs="+", metavar="NxK", default=LLAMA_2_7B)
    parser.add_argument("--decoder-layers", type=int, default=DECODER_LAYERS)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the rows to a file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts: dict[str, Any] = {
        "isa": CpuBackend().instruction_set, "threads": options.threads, "pattern": "2:4",
        "decoder_layers": options.decoder_layers,
    }  # fmt: skip
    with kept_rows(parser, options.json, facts, KEY, OLDER) as result:
        for values, (n, k) in itertools.product(VALUES, options.shapes):
            if (n, k, values) not in result:
                result.add(asdict(measure(n, k, values, options.decoder_layers)))
        columns = Row.__dataclass_fields__
        Console().print(table([Row(**{c: row[c] for c in columns}) for row in result.all()]))


if __name__ == "__main__":
    main()
