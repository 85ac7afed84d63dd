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

from benchmarks.models import gemma3, smollm2
from benchmarks.records.drawing import save
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
from benchmarks.studies.subject import QUICK, Subject
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


MODELS: Mapping[str, Callable[[], Path]] = {"smollm2": smollm2, "gemma3": gemma3}


def run(name: str, subject: Subject, output: Path, plot: Path | None) -> None:
    """Measure what is missing in a result, and draw it."""
    study = STUDIES[name]
    cells = Cells(output, {"study": name, **subject.facts}, study.key)
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
    directory = MODELS[options.model or study.model]()
    subject = Subject(
        directory.name,
        directory,
        sotu().calibration,
        {"in domain": sotu().held_out, "novels": austen()},
        QUICK if options.quick else study.sizes,
        {"addresses": sotu().calibration, "Python's manual": python_manual()},
    )
    run(options.name, subject, options.json, options.plot)


if __name__ == "__main__":
    main()
