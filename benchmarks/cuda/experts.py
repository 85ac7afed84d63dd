"""Times sparse experts on a GPU against dense ones.

    python -m benchmarks.cuda.experts --json results.json

A call multiplies the experts of one layer. Dense ones are multiplied as Transformers does, by
PyTorch's grouped product, with all around it: sorting, gathering, the activation, the sum. Calls
are captured in a CUDA graph, 32 at least; tokens are spread evenly over the experts, and go to
others in the next call, so that the cache has forgotten those. The graphs of all contestants are
replayed in turns; numbers are medians over replays. A result that is wrong is not timed. Needs
PyTorch alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.cuda import INCOMPLETE
from benchmarks.cuda.card import this_card
from benchmarks.cuda.contestants import CUDA, Call
from benchmarks.cuda.turns import CaptureError, captured, first_line, medians
from benchmarks.records.machine import revision, write_json
from benchmarks.records.result_file import new_result
from benchmarks.shapes import EXPERTS, ExpertShape, Layer, random_layer, to_int8
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.backends.weights import StackedWeights

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
OURS, INT8, DENSE = "permllm", "permllm, int8", "grouped mm"
WEIGHT_BYTES = {OURS: 1.125, INT8: 0.625, DENSE: 2.0}
DISTINCT = 4
"""Experts that are drawn; the others are copies, in memory of their own."""
GROUPED = (9, 10)
"""Major compute capabilities on which PyTorch has a grouped product that can be captured."""
ERROR_LIMIT = 8e-3
"""Of a result; activations are rounded between its products too."""
Distinct = tuple[list[Layer], list[Layer]]
"""Gate and up, and down, of the experts that are drawn."""
Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From activations [tokens, hidden], and weights and int32 ids [tokens, choices] of a router."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant on the experts of a model; times are medians in microseconds."""

    model: str
    tokens: int
    contestant: str
    us: float
    floor_us: float
    """Bytes of the experts that tokens go to over the measured bandwidth of a copy."""
    relative_error: float


@dataclasses.dataclass(frozen=True)
class Contestant:
    """A way to multiply, and the distinct weights, gate and up and down, that it multiplies by."""

    multiply: Experts
    gate_up: Sequence[Tensor]
    down: Sequence[Tensor]

    def checked_error(self, x: Tensor, weights: Tensor, ids: Tensor) -> float:
        """Of two tokens; raises ValueError where it is above ERROR_LIMIT."""
        found = self.multiply(x, weights, ids)[:2].double()
        exact = torch.zeros_like(found)
        for token, row in enumerate(x[:2].double()):
            for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
                gate, up = (self.gate_up[expert % DISTINCT].double() @ row).chunk(2)
                exact[token] += weight * (self.down[expert % DISTINCT].double() @ (silu(gate) * up))
        error = float((found - exact).norm() / exact.norm())
        if not error <= ERROR_LIMIT:
            raise ValueError(f"its relative error is {error:.2e}, more than {ERROR_LIMIT}")
        return error


def drawn(shape: ExpertShape) -> Distinct:
    """Random 2:4 layers, the same for every contestant."""
    sizes = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    gate_up, down = (
        [random_layer(n, k, by_magnitude=True, seed=expert) for expert in range(DISTINCT)]
        for n, k in sizes
    )
    return gate_up, down


def sparse(shape: ExpertShape, layers: Distinct) -> Contestant:
    """Our operator."""
    backend = CudaBackend(torch.bfloat16)

    def stacked(distinct: Sequence[Layer]) -> StackedWeights:
        packed = [backend.pack(layer.weights) for layer in distinct]
        return backend.stack([packed[expert % DISTINCT] for expert in range(shape.experts)])

    operands = [
        None if part is None else part.to(CUDA)
        for distinct in layers
        for part in vars(stacked(distinct)).values()
    ]
    torch.cuda.synchronize(CUDA)

    def multiply(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        y: Tensor = torch.ops.permllm.sparse_experts(x, weights, ids, *operands, shape.inner)
        return y

    return Contestant(multiply, *_dense(layers))


def grouped(shape: ExpertShape, layers: Distinct) -> Contestant:
    """PyTorch's grouped product of dense weights.

    Raises:
        NotImplementedError: on this GPU it asks the host for the sizes of the groups.
    """
    if CUDA.type == "cuda" and torch.cuda.get_device_capability(CUDA)[0] not in GROUPED:
        raise NotImplementedError("PyTorch's grouped product waits for the GPU on this one")
    distinct = _dense(layers)
    gate_up, down = (
        torch.stack([one[expert % DISTINCT] for expert in range(shape.experts)]) for one in distinct
    )

    def multiply(x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return grouped_product(x, weights, ids, gate_up, down)

    return Contestant(multiply, *distinct)


def grouped_product(
    x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """The sum of each token's experts, of dense weights `[experts, out, in]`; waits for nothing."""
    chosen, order = ids.flatten().sort(stable=True)
    experts = torch.arange(len(gate_up), device=x.device, dtype=chosen.dtype)
    ends = torch.searchsorted(chosen, experts, right=True).to(torch.int32)
    rows = x[order // ids.shape[1]]
    gate, up = torch._grouped_mm(rows, gate_up.transpose(-2, -1), offs=ends).chunk(2, dim=-1)
    sorted_rows = torch._grouped_mm(silu(gate) * up, down.transpose(-2, -1), offs=ends)
    outputs = torch.empty_like(sorted_rows)
    outputs[order] = sorted_rows
    outputs = outputs.unflatten(0, ids.shape)
    return (outputs * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def _dense(layers: Distinct) -> tuple[list[Tensor], list[Tensor]]:
    gate_up, down = ([layer.dense.to(CUDA) for layer in distinct] for distinct in layers)
    return gate_up, down


def contestants(shape: ExpertShape) -> dict[str, Contestant]:
    """All that can be timed here; what cannot be made is left out, with a line why."""
    layers = drawn(shape)
    rounded = list(map(to_int8, layers[0])), list(map(to_int8, layers[1]))
    found = {}
    for name, make, given in (
        (OURS, sparse, layers),
        (DENSE, grouped, layers),
        (INT8, sparse, rounded),
    ):
        try:
            found[name] = make(shape, given)
        except (RuntimeError, AttributeError, NotImplementedError) as error:
            print(f"no {name}: {first_line(error)}")
    return found


def routes(shape: ExpertShape, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and ids of calls, one after the other: tokens are spread evenly over the experts."""
    for start in itertools.count(step=tokens * shape.choices):
        numbers = start + torch.arange(tokens * shape.choices, device=CUDA)
        ids = (numbers % shape.experts).view(tokens, shape.choices).to(torch.int32)
        yield torch.full(ids.shape, 1 / shape.choices, device=CUDA), ids


def measure(model: str, tokens: Sequence[int], speed: float, end: float) -> Iterator[list[Row]]:
    """The rows of one number of tokens after the other; nothing is begun after `end`."""
    shape = EXPERTS[model]
    found = contestants(shape)
    for m in tokens:
        if time.monotonic() > end:
            break
        x = torch.randn(m, shape.hidden, device=CUDA).bfloat16()
        calls_of_all_experts = max(2, math.ceil(shape.experts / (m * shape.choices)))
        given = list(itertools.islice(routes(shape, m), calls_of_all_experts))
        turns, errors = {}, {}
        for name, contestant in list(found.items()):
            try:
                errors[name] = contestant.checked_error(x, *given[0])
                turns[name] = captured(_calls(contestant, given), [x])
            except (RuntimeError, ValueError, NotImplementedError) as error:
                print(f"{model}, {m} tokens: no {name}: {first_line(error)}")
                if isinstance(error, CaptureError):
                    del found[name]
        yield [
            Row(
                model=model,
                tokens=m,
                contestant=name,
                us=round(us, 2),
                floor_us=round(_bytes(name, shape, m) / speed, 2),
                relative_error=float(f"{errors[name]:.2e}"),
            )
            for name, us in medians(turns, 5 if m > 1024 else 15).items()
        ]
        del turns  # the memory of graphs


def _calls(contestant: Contestant, given: Sequence[tuple[Tensor, Tensor]]) -> list[Call]:
    def call(weights: Tensor, ids: Tensor) -> Call:
        return lambda x: contestant.multiply(x, weights, ids)

    return [call(*own) for own in given]


def _bytes(name: str, shape: ExpertShape, tokens: int) -> float:
    hit = min(tokens * shape.choices, shape.experts)
    return hit * 3 * shape.hidden * shape.inner * WEIGHT_BYTES[name]


def table(rows: Sequence[Row]) -> str:
    """A line per model and number of tokens: our time, and what the others take of it."""
    lines = [f"{'experts':>14}  {'tokens':>6}  {OURS:>20}  {INT8:>20}  {DENSE:>20}"]
    cases = dict.fromkeys((row.model, row.tokens) for row in rows)
    for model, m in cases:
        found = {row.contestant: row for row in rows if (row.model, row.tokens) == (model, m)}
        ours, cells = found.get(OURS), []
        for name in (OURS, INT8, DENSE):
            row = found.get(name)
            ratio = "" if row is None or ours is None else f" {row.us / ours.us:>6.2f}x"
            cells.append(f"{'-':>20}" if row is None else f"{row.us:>9.1f} us{ratio}".rjust(20))
        lines.append("  ".join([f"{model:>14}", f"{m:>6}", *cells]))
    return "\n".join(lines)


def incomplete(rows: Sequence[Row], models: Sequence[str], tokens: Sequence[int]) -> list[str]:
    """Models of which a row of ours is missing."""
    there = {(row.model, row.tokens, row.contestant) for row in rows}
    return [
        model
        for model in models
        if any((model, m, name) not in there for m in tokens for name in (OURS, INT8))
    ]


def run(
    models: Sequence[str], tokens: Sequence[int], json_file: Path | None, seconds: float
) -> None:
    """Measures, begins nothing further after `seconds`, prints a table, writes JSON.

    Exits with INCOMPLETE where something of ours was left out.
    """
    end, begun = time.monotonic() + seconds, revision()
    card = this_card()
    rows: list[Row] = []
    with torch.inference_mode():
        for model in models:
            for found in measure(model, tokens, card.speed, end):
                rows += found
                if json_file:
                    result = {"rows": [dataclasses.asdict(row) for row in rows]}
                    write_json(json_file, card.facts() | result, begun)
            torch.cuda.empty_cache()
    print(table(rows))
    if missing := incomplete(rows, models, tokens):
        print(f"left out, in whole or in part: {', '.join(missing)}")
        sys.exit(INCOMPLETE)


def main() -> None:
    """Reads the command line and runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.experts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=EXPERTS, default=list(EXPERTS))
    parser.add_argument("--m", type=int, nargs="+", metavar="TOKENS", default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=600, help="begin nothing after them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    arguments = parser.parse_args()
    with new_result(parser, arguments.json):
        run(arguments.models, arguments.m, arguments.json, arguments.seconds)


if __name__ == "__main__":
    main()
