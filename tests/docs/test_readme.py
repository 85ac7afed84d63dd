"""The README lists every page; the pages on pruning and models every method, effort and family."""

import re
from pathlib import Path

import pytest

from permllm_offline.model.families import FAMILIES
from permllm_offline.preparation.recipe_input import EFFORTS
from permllm_offline.recipe.methods import METHODS

ROOT = Path(__file__).parents[2]
SECTION = re.compile(r"^##+ (.+)\n((?:(?!##).*\n)*)", re.MULTILINE)


def sections(page: str) -> dict[str, str]:
    """The text below each heading of a page."""
    return dict(SECTION.findall((ROOT / page).read_text(encoding="utf-8")))


README = sections("README.md")
METHODS_OF_PRUNING = sections("docs/pruning.md")["Methods"]
KNOWN = sections("docs/models.md")["Families"]


def test_every_method_is_a_row() -> None:
    first_cells = re.findall(r"^\|([^|]*)\|", METHODS_OF_PRUNING, re.MULTILINE)
    listed = re.findall(r"`([^`]+)`", "".join(first_cells))
    assert sorted(listed) == sorted([*METHODS, "--method"])


def test_every_effort_is_named() -> None:
    assert "--effort " + r"\|".join(EFFORTS) in METHODS_OF_PRUNING


def test_the_families_are_those_of_the_code() -> None:
    lists = re.findall(r"^- \*\*.+\n(?:  .+\n)*", KNOWN, re.MULTILINE)
    assert {name for text in lists for name in re.findall(r"`([^`]+)`", text)} == {*FAMILIES}


def test_models_that_are_known_by_name_are_of_families() -> None:
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|$", KNOWN, re.MULTILINE)
    named = [re.findall(r"`([^`]+)`", families) for models, families in rows if "**" not in models]
    assert len(named) > 5
    assert {name for row in named for name in row} <= {*FAMILIES, "model_type"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked(page: Path) -> None:
    assert f"(docs/{page.name})" in README["Documentation"]
