"""What pages say in numbers stands in tables that `benchmarks.tables` writes from the results."""

import re
from pathlib import Path

import pytest

from benchmarks import figures, tables

ROOT = Path(__file__).parents[2]
MEASURED = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in ("results", "studies"))]
UNMEASURED = ("cuda.md",)
"""Its decimal cells are compute capabilities: nothing ran on a GPU."""


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.updated(page) == text, "run: python -m benchmarks.tables"
    assert (
        text.count("<!-- table:") == text.count("<!-- end -->") == len(tables.BLOCK.findall(text))
    )


def measured_rows(text: str) -> list[str]:
    """Rows of tables of which a cell is a decimal number."""
    return re.findall(r"^\|.*\| *\d+\.\d+x? *\|.*$", text, re.MULTILINE)


@pytest.mark.parametrize("page", MEASURED, ids=lambda page: page.name)
def test_a_page_of_measurements_has_number_tables(page: Path) -> None:
    assert measured_rows(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "page",
    [page for page in tables.pages() if page.name not in UNMEASURED],
    ids=lambda page: page.name,
)
def test_every_number_table_has_a_record(page: Path) -> None:
    assert not measured_rows(tables.BLOCK.sub("", page.read_text(encoding="utf-8")))


def test_every_record_and_every_figure_is_on_a_page() -> None:
    named = [*tables.pages(), ROOT / "CONTRIBUTING.md"]
    text = "".join(page.read_text(encoding="utf-8") for page in named)
    records = {file.name for file in tables.RESULTS.glob("*.json")}
    assert records == set(re.findall(r"benchmarks/results/([\w.-]+\.json)\)", text))
    drawn = {file.stem for file in (ROOT / "docs" / "figures").iterdir()}
    assert drawn == set(figures.shown([page.read_text("utf-8") for page in tables.pages()]))
