"""Draws the figures of the documentation from the results: those that a page shows.

python -m benchmarks.figures    # rewrite docs/figures/*.svg
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import quality
from .engines.serving_plots import save_figure
from .records.drawing import save
from .tables import pages

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"
QUALITY: Mapping[str, Sequence[str]] = {
    "quality-smollm2": (
        "dense-quantization-smollm2",
        *("accuracy-smollm2-smoothing", "accuracy-smollm2-integers", "accuracy-smollm2-high"),
    ),
}
"""Figures of quality lost against bits a weight, and the records that each draws."""


def shown(texts: Sequence[str]) -> list[str]:
    """Names of the figures that pages show."""
    found = (re.findall(r"figures/([\w.-]+)\.svg\)", text) for text in texts)
    return sorted({name for names in found for name in names})


def draw(names: Sequence[str], results: Path = RESULTS, figures: Path = FIGURES) -> list[Path]:
    """Draw figures by their names; return where they are."""
    drawn = []
    for name in names:
        drawn.append(figures / f"{name}.svg")
        if name in QUALITY:
            records = {record: _read(results, record) for record in QUALITY[name]}
            save(quality.draw, records, drawn[-1], panels=3, columns=3, size=(10.0, 4.2))
        else:
            result = _read(results, name)
            title = f"{result['model']} on {result['machine']['cpu']}, {result['mode']}"
            save_figure(result, drawn[-1], title)
    return drawn


def _read(results: Path, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
    return found


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path in draw(shown([page.read_text(encoding="utf-8") for page in pages()])):
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
