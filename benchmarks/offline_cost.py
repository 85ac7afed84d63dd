"""What learning permutations costs against the paper's dense loop, and what a whole prune costs.

    python -m benchmarks.offline_cost --json OUT             # one layer, a step at each width
    python -m benchmarks.offline_cost --quality --json OUT   # time to equal quality on SmolLM2-135M
    python -m benchmarks.offline_cost --pipeline --json OUT  # whole prunes of SmolLM2-135M
    python -m benchmarks.offline_cost --quick [--quality|--pipeline] --json OUT
    python -m benchmarks.offline_cost --from RESULT --plot OUT.svg    # draw, measure nothing

The first measures one square linear layer: seconds of a learning step, and the growth of the peak
resident memory, each loop in a process of its own. The second lets the dense loop learn for some
steps, and this project's until its perplexity on held-out text, in and out of domain, is no worse;
beside them stand the dense model and Wanda. What OUT has of it already is kept.
The third prunes by one method after the other, each in a process of its own, and splits the time by
the steps that the prune itself writes down; rows that OUT already has are not made again. The
checkpoints can be kept with --checkpoints DIR, and `benchmarks.accuracy` evaluates them there.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional

from permllm_offline.permutation.hardening import Hardener
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation
from permllm_offline.permutation.sinkhorn import sinkhorn
from permllm_vllm.checkpoint.pattern import Pattern

from .pruning.cost_plots import draw_pipeline, draw_quality, draw_steps
from .pruning.cost_tables import pipeline
from .pruning.dense_permutations import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    DenseMaskedLinear,
    DensePermutation,
    SharedMatrix,
)
from .pruning.pipeline_cost import METHODS, QUICK_METHODS, PipelineCost, facts
from .pruning.quality_time import QualityTime
from .records.drawing import save
from .records.machine import write_json
from .studies.cells import Cells

PATTERN, BLOCK = Pattern(2, 4), 64
WIDTHS, QUICK_WIDTHS = (576, 2048, 4096), (128,)
TOKENS, STEPS = 512, 3
LOOPS = ("dense", "ours")


@dataclass(frozen=True)
class StepCost:
    """Median seconds of a learning step of one layer; growth of the peak resident memory."""

    loop: str
    width: int
    seconds: float
    peak_mib: float
    assignments: int


class LayerStep:
    """One learning step of one square layer against random inputs, by either loop."""

    def __init__(self, loop: str, width: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(width, width, bias=False).requires_grad_(False)
        linear = linear.to(torch.bfloat16)
        self._inputs = torch.randn((tokens, width), generator=generator).to(torch.bfloat16)
        self._target = self._inputs @ linear.weight.t()
        importance = linear.weight.float().abs()
        self.assignments = 0
        if loop == "dense":
            self._shared = SharedMatrix(DensePermutation(width, BLOCK, generator))
            self._module: nn.Module = DenseMaskedLinear(linear, importance, PATTERN, self._shared)
            parameters = list(self._shared.permutation.parameters())
            self.take: Callable[[], None] = self._dense
        else:
            blocks = width // BLOCK
            noise = torch.rand((blocks, BLOCK, BLOCK), generator=generator)
            self._logits = nn.Parameter(noise)
            self._permutation = StepPermutation(torch.empty(0), torch.arange(blocks))
            self._module = PermutedMaskedLinear(linear, importance, PATTERN, self._permutation)
            self._hardener = Hardener()
            parameters = [self._logits]
            self.take = self._ours
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def _dense(self) -> None:
        self._shared.forget()
        self._backward()
        self.assignments += len(self._shared.permutation.weight)
        self._move()

    def _ours(self) -> None:
        soft = sinkhorn(self._logits, 1.0, 5)
        starts = torch.arange(len(self._logits))[:, None] * BLOCK
        self._permutation.order = (self._hardener(soft) + starts).flatten()
        self._permutation.soft = soft.detach().requires_grad_()
        self._backward()
        soft.backward(self._permutation.soft.grad)
        self.assignments = self._hardener.solved
        self._move()

    def _backward(self) -> None:
        output = self._module(self._inputs).float()
        (1 - functional.cosine_similarity(output, self._target.float(), dim=-1).mean()).backward()

    def _move(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure_step(loop: str, width: int, tokens: int, steps: int) -> StepCost:
    """Time steps of one loop at one width, in this process."""
    step = LayerStep(loop, width, tokens)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        step.take()
        seconds.append(time.perf_counter() - start)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return StepCost(loop, width, sorted(seconds)[steps // 2], growth, step.assignments)


def step_costs(widths: tuple[int, ...], tokens: int, steps: int) -> list[StepCost]:
    """Every loop at every width, each in a fresh process, one after the other."""
    context = multiprocessing.get_context("spawn")
    costs = []
    for width in widths:
        for loop in LOOPS:
            with context.Pool(1) as pool:
                costs.append(pool.apply(measure_step, (loop, width, tokens, steps)))
    return costs


def show_steps(costs: list[StepCost]) -> None:
    """Print the costs as a table."""
    table = Table(title=f"a learning step of one layer, {torch.get_num_threads()} threads")
    for column in ("channels", "loop", "seconds", "peak MiB above start", "assignments solved"):
        table.add_column(column, justify="right")
    for cost in costs:
        cells = (f"{cost.seconds:.3f}", f"{cost.peak_mib:.0f}", str(cost.assignments))
        table.add_row(str(cost.width), cost.loop, *cells)
    Console().print(table)


def measure_steps(output: Path, *, quick: bool) -> None:
    """One layer at each width."""
    widths, tokens = (QUICK_WIDTHS, 64) if quick else (WIDTHS, TOKENS)
    costs = step_costs(widths, tokens, STEPS)
    shared = {"tokens": tokens, "block_size": BLOCK, "threads": torch.get_num_threads()}
    write_json(output, shared | {"steps": [asdict(cost) for cost in costs]})
    show_steps(costs)


def measure_quality(output: Path, seed: int, steps: int, *, quick: bool) -> None:
    """Time to equal quality, and what both loops stand between: what OUT lacks of it.

    Raises:
        ValueError: OUT has the quality of another seed, another number of steps, or threads.
    """
    found: dict[str, Any] = {}
    steps = 1 if quick else steps
    if output.exists():
        found = json.loads(output.read_text(encoding="utf-8"))
        there = found["seed"], found["threads"], found["baseline"]["steps"]
        here = seed, torch.get_num_threads(), steps
        if there != here:
            raise ValueError(
                f"{output} has seed, threads and steps {there}, this run has {here}: give another "
                "file"
            )
    quality = QualityTime(seed, steps, quick=quick)
    if "baseline" not in found:
        found = {"model": "SmolLM2-135M-Instruct", **quality.measure()}
        write_json(output, found)
    if "references" not in found:
        found["references"] = quality.references()
        # The machine, versions and date of the times stay.
        output.write_text(json.dumps(json.loads(output.read_text()) | found, indent=1) + "\n")
    Console().print_json(json.dumps(found))


def measure_pipeline(output: Path, checkpoints: Path | None, *, quick: bool) -> None:
    """Whole prunes, those that the result lacks; a folder for checkpoints keeps them."""
    shared = {**facts(quick=quick), "threads": torch.get_num_threads()}
    cells = Cells(output, shared, ("method",))
    with tempfile.TemporaryDirectory(prefix="permllm-pipeline-") as directory:
        cost = PipelineCost(checkpoints or Path(directory), quick=quick)
        for name in QUICK_METHODS if quick else METHODS:
            cells.row({"method": name}, partial(cost.measure, name))
    Console().print(pipeline({"rows": cells.rows}), soft_wrap=True)


def draw(result: Path, output: Path) -> None:
    """Draw a result of any of the three kinds."""
    found = json.loads(result.read_text(encoding="utf-8"))
    if "baseline" in found:
        save(draw_quality, found, output)
    elif "steps" in found:
        save(draw_steps, found, output)
    else:
        save(draw_pipeline, found["rows"], output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quality", action="store_true", help="time to equal quality, instead")
    kind.add_argument("--pipeline", action="store_true", help="whole prunes, instead")
    parser.add_argument("--steps", type=int, default=40, help="of the dense loop with --quality")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="keep those of --pipeline there"
    )
    parser.add_argument("--quick", action="store_true", help="only whether it runs")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--json", type=Path, help="where the result is written")
    output.add_argument("--from", type=Path, dest="found", help="an earlier result, to draw")
    parser.add_argument("--plot", type=Path, help="where the SVG is written")
    options = parser.parse_args()
    if options.found is None:
        try:
            if options.quality:
                measure_quality(options.json, options.seed, options.steps, quick=options.quick)
            elif options.pipeline:
                measure_pipeline(options.json, options.checkpoints, quick=options.quick)
            else:
                measure_steps(options.json, quick=options.quick)
        except ValueError as error:
            parser.error(str(error))
    if options.plot is not None:
        draw(options.found or options.json, options.plot)


if __name__ == "__main__":
    main()
