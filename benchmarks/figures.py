"""Draws the figures of the documentation on serving from the results.

python -m benchmarks.figures    # rewrite docs/figures/serving-*.svg, one for each result
"""

import argparse
import json
from pathlib import Path

from .engines.serving_plots import save_figure

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "benchmarks" / "results", ROOT / "docs" / "figures"


def draw(results: Path = RESULTS, figures: Path = FIGURES) -> list[Path]:
    """Draw a figure for each serving result; return where they are."""
    drawn = []
    for file in sorted(results.glob("serving-*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        drawn.append(figures / f"{file.stem}.svg")
        title = f"{result['model']} on {result['machine']['cpu']}, {result['mode']}"
        save_figure(result, drawn[-1], title)
    return drawn


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    for path in draw():
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
