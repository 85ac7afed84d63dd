"""What pages say in numbers stands in tables that `benchmarks.tables` writes from the results."""

import re
from pathlib import Path

import pytest

from benchmarks import tables

ROOT = Path(__file__).parents[2]
MACHINES = ("amx", "zen3", "zen4", "zen5")
PAGES = (
    *("cpu", "results", "studies"),
    *(f"{what}-{m}" for what in ("kernels", "serving") for m in MACHINES),
)
MEASURED = [ROOT / "README.md", *(ROOT / "docs" / f"{page}.md" for page in PAGES)]
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


@pytest.mark.parametrize("file", tables.RESULTS.glob("serving-*.json"), ids=lambda file: file.stem)
def test_every_serving_record_is_shown_as_a_whole(file: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.pages())
    for view in ("decode", "first-token", "vllm-bench"):
        assert f"<!-- table: {file.stem} {view} -->" in pages
    assert f"figures/{file.stem}.svg)" in pages
    assert (ROOT / "docs" / "figures" / f"{file.stem}.svg").exists()
