"""Studies: one question each, on a real model, in sizes that one processor core finishes.

    python -m benchmarks.studies NAME --json OUT [--plot OUT.svg]
    python -m benchmarks.studies NAME --quick --json OUT

The result is written after each measurement, and measurements that it holds already are kept.
Calibrated on State of the Union addresses; evaluated on held-out ones and on six novels.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from benchmarks.models import GEMMA3, SMOLLM2, gemma3, smollm2
from benchmarks.records.drawing import save
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from benchmarks.studies import (
    blocks,
    calibration,
    head,
    layers,
    quantization,
    score_or_loss,
    transfer,
)
from benchmarks.studies.cells import Cells
from benchmarks.studies.study import Study
from benchmarks.studies.subject import QUICK, Subject, facts
from benchmarks.texts import austen, python_manual, sotu

STUDIES: Mapping[str, Study] = {
    "blocks": blocks.STUDY,
    "calibration": calibration.STUDY,
    "head": head.STUDY,
    "layers": layers.STUDY,
    "quantization": quantization.STUDY,
    "score-or-loss": score_or_loss.STUDY,
    "transfer": transfer.STUDY,
}


MODELS: Mapping[str, tuple[str, Callable[[], Path]]] = {
    "smollm2": (SMOLLM2.name, smollm2),
    "gemma3": (GEMMA3.name, gemma3),
}
"""Name in a result, and what makes the model."""


def run(name: str, subject: Subject, rows: Rows, plot: Path | None) -> None:
    """Measure what is missing in a result, and draw it."""
    study, cells = STUDIES[name], Cells(rows)
    study.measure(subject, cells)
    if plot is not None:
        save(study.draw, cells.rows, plot)
    Console().print_json(json.dumps(list(cells.rows)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    summaries = "; ".join(f"{name}: {study.summary}" for name, study in STUDIES.items())
    parser.add_argument("name", choices=list(STUDIES), metavar="NAME", help=summaries)
    parser.add_argument("--model", choices=list(MODELS), help="in place of the study's own")
    parser.add_argument("--quick", action="store_true", help="few and short windows and steps")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--plot", type=Path, help="where the SVG is written")
    options = parser.parse_args()
    study = STUDIES[options.name]
    model, make = MODELS[options.model or study.model]
    sizes = QUICK if options.quick else study.sizes
    shared = {"study": options.name, **facts(model, sizes)}
    with kept_rows(parser, options.json, shared, study.key) as rows:
        subject = Subject(
            model,
            make(),
            sotu().calibration,
            {"in domain": sotu().held_out, "novels": austen()},
            sizes,
            {"addresses": sotu().calibration, "Python's manual": python_manual()},
        )
        run(options.name, subject, rows, options.plot)


if __name__ == "__main__":
    main()
