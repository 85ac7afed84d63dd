"""What learning permutations costs against the paper's dense loop, and what a whole prune costs.

    python -m benchmarks.offline_cost --json OUT             # one layer, a step at each width
    python -m benchmarks.offline_cost --quality --json OUT   # time to equal quality on SmolLM2-135M
    python -m benchmarks.offline_cost --pipeline --json OUT  # whole prunes of SmolLM2-135M
    python -m benchmarks.offline_cost --quick [--quality|--pipeline] --json OUT
    python -m benchmarks.offline_cost --from RESULT --plot OUT.svg    # draw, measure nothing

The first measures one square linear layer: seconds of a learning step, and the growth of the peak
resident memory, each loop in a process of its own. The second lets the dense loop learn for some
steps, and this project's until its perplexity is no worse on any text: held-out addresses (in
domain), novels, and Python's manual; beside them stand the dense model and Wanda, and ratios to
both. What OUT has of it already is kept; of the first, OUT must be a new file.
The third prunes by one method after the other, each in a process of its own, and splits the time by
the steps that the prune itself writes down; rows that OUT already has are not made again, and a
method that no checkpoint can hold ends in memory. --methods takes some of them, or another order.
The checkpoints can be kept with --checkpoints DIR, and `benchmarks.accuracy` evaluates them there.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from .pruning.cost_plots import draw_pipeline, draw_quality, draw_steps
from .pruning.cost_tables import pipeline
from .pruning.layer_step import BLOCK, StepCost, step_costs
from .pruning.pipeline_cost import METHODS, QUICK_METHODS, PipelineCost, facts
from .pruning.quality_result import known_quality, ratios
from .pruning.quality_time import QualityTime
from .records.drawing import save
from .records.machine import revision, write_json
from .records.result_file import held, kept_rows, new_result
from .records.rows import STAMP, Rows
from .studies.cells import Cells

WIDTHS, QUICK_WIDTHS = (576, 2048, 4096), (128,)
TOKENS, STEPS = 512, 3
DENSE_STEPS, QUICK_DENSE_STEPS = 40, 1
"""Of the dense loop with --quality."""


def show_steps(costs: list[StepCost]) -> None:
    """Print the costs as a table."""
    table = Table(title=f"a learning step of one layer, {torch.get_num_threads()} threads")
    for column in ("channels", "loop", "seconds", "peak MiB above start", "assignments solved"):
        table.add_column(column, justify="right")
    for cost in costs:
        peak = "" if cost.peak_mib is None else f"{cost.peak_mib:.0f}"
        cells = (f"{cost.seconds:.3f}", peak, str(cost.assignments))
        table.add_row(str(cost.width), cost.loop, *cells)
    Console().print(table)


def measure_steps(output: Path, *, quick: bool) -> None:
    """One layer at each width."""
    widths, tokens = (QUICK_WIDTHS, 64) if quick else (WIDTHS, TOKENS)
    begun = revision()
    costs = step_costs(widths, tokens, STEPS)
    shared = {"tokens": tokens, "block_size": BLOCK, "threads": torch.get_num_threads()}
    write_json(output, shared | {"steps": [asdict(cost) for cost in costs]}, begun)
    show_steps(costs)


def measure_quality(output: Path, seed: int, steps: int, *, quick: bool) -> None:
    """Time to equal quality, and what both loops stand between: what OUT lacks of it.

    It is written after each loop.

    Raises:
        ValueError: OUT is a result of another kind, or was measured with other settings, on another
            CPU, or with other versions.
    """
    threads = torch.get_num_threads()
    settings = {"seed": seed, "steps": steps, "quick": quick, "threads": threads}
    found = {"model": "SmolLM2-135M-Instruct", **settings}
    if output.exists():
        found = known_quality(output, settings)
    begun = str(found.get("commit") or revision() or "").partition("..")[0] or None
    quality = QualityTime(seed, steps, quick=quick)
    if "reached" not in found:
        for part in quality.measure(found):
            found = {name: found[name] for name in found if name not in STAMP} | part
            write_json(output, found, begun)
    if "references" not in found:
        found["references"] = quality.references()
    if "ratios" not in found:
        found["ratios"] = ratios(found)
        # The machine, versions and date of the times stay.
        output.write_text(json.dumps(json.loads(output.read_text()) | found, indent=1) + "\n")
    Console().print_json(json.dumps(found))


def measure_pipeline(
    rows: Rows, checkpoints: Path | None, methods: Sequence[str] | None, *, quick: bool
) -> None:
    """Whole prunes, those that the result lacks; a folder for checkpoints keeps them.

    They are made in the order of ``methods``, by default all, and stand in that of the table.
    """
    cells = Cells(rows)
    with tempfile.TemporaryDirectory(prefix="permllm-pipeline-") as directory:
        cost = PipelineCost(checkpoints or Path(directory), quick=quick)
        for name in methods or (QUICK_METHODS if quick else METHODS):
            cells.row({"method": name}, partial(cost.measure, name))
            cells.sort(lambda row: METHODS.index(row["method"]))
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quality", action="store_true", help="time to equal quality, instead")
    kind.add_argument("--pipeline", action="store_true", help="whole prunes, instead")
    parser.add_argument(
        "--steps", type=int, help=f"of the dense loop with --quality (default: {DENSE_STEPS})"
    )
    parser.add_argument("--seed", type=int, help="of --quality (default: 0)")
    parser.add_argument(
        "--checkpoints", type=Path, metavar="DIR", help="keep those of --pipeline there"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, metavar="NAME", help="of --pipeline (default: all)"
    )
    parser.add_argument("--quick", action="store_true", help="only whether it runs")
    output = parser.add_mutually_exclusive_group(required=True)
    output.add_argument("--json", type=Path, help="where the result is written")
    output.add_argument("--from", type=Path, dest="found", help="an earlier result, to draw")
    parser.add_argument("--plot", type=Path, help="where the SVG is written")
    return parser


def _contradiction(options: argparse.Namespace) -> str | None:
    """What is wrong with options that do not go together."""
    if options.checkpoints is not None and not options.pipeline:
        return "--checkpoints are those of --pipeline: give it too"
    if options.methods is not None and not options.pipeline:
        return "--methods are those of --pipeline: give it too"
    if not options.quality and (options.steps is not None or options.seed is not None):
        return "--steps and --seed are those of --quality: give it too"
    if options.quick and options.steps is not None:
        return f"--quick takes {QUICK_DENSE_STEPS} step: leave out --steps"
    if options.found is not None and (options.quality or options.pipeline or options.quick):
        return "--from measures nothing: leave out --quality, --pipeline and --quick"
    if options.found is not None and options.plot is None:
        return "--from only draws: give --plot"
    return None


def _measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the command where the result's file cannot go on."""
    if options.quality:
        steps = options.steps
        if steps is None:
            steps = QUICK_DENSE_STEPS if options.quick else DENSE_STEPS
        with held(parser, options.json):
            try:
                measure_quality(options.json, options.seed or 0, steps, quick=options.quick)
            except ValueError as error:
                parser.error(str(error))
    elif options.pipeline:
        shared = {**facts(quick=options.quick), "threads": torch.get_num_threads()}
        with kept_rows(parser, options.json, shared, ("method",)) as rows:
            measure_pipeline(rows, options.checkpoints, options.methods, quick=options.quick)
    else:
        with new_result(parser, options.json):
            measure_steps(options.json, quick=options.quick)


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    contradiction = _contradiction(options)
    if contradiction is not None:
        parser.error(contradiction)
    if options.found is None:
        _measure(parser, options)
    if options.plot is not None:
        draw(options.found or options.json, options.plot)


if __name__ == "__main__":
    main()
