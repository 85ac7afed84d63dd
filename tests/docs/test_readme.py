"""The README lists every method, family, effort and page."""

import re
from pathlib import Path

import pytest

from permllm_offline.model.families import FAMILIES
from permllm_offline.preparation.recipe_input import EFFORTS
from permllm_offline.recipe.methods import METHODS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SECTION = re.compile(r"^##+ (.+)\n((?:(?!##).*\n)*)", re.MULTILINE)
SECTIONS = dict(SECTION.findall(README))


def test_every_method_is_a_row() -> None:
    first_cells = re.findall(r"^\|([^|]*)\|", SECTIONS["Methods"], re.MULTILINE)
    listed = re.findall(r"`([^`]+)`", "".join(first_cells))
    assert sorted(listed) == sorted([*METHODS, "--method"])


def test_every_effort_is_named() -> None:
    assert "--effort " + r"\|".join(EFFORTS) in SECTIONS["Methods"]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_named(model_type: str) -> None:
    letters = re.sub(r"[^a-z0-9]", "", SECTIONS["Families"].lower())
    assert model_type.replace("_", "") in letters


def test_models_that_are_known_by_name_are_of_families() -> None:
    rows = re.findall(r"^\|([^|]+)\|([^|]+)\|$", SECTIONS["Families"], re.MULTILINE)
    named = [re.findall(r"`([^`]+)`", families) for models, families in rows if "**" not in models]
    assert len(named) > 5
    assert {name for row in named for name in row} <= {*FAMILIES, "model_type"}


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_page_is_linked(page: Path) -> None:
    assert f"(docs/{page.name})" in SECTIONS["Documentation"]
