"""Version, changelog, Dockerfile and links agree with the tree."""

import re
import tomllib
from pathlib import Path

import pytest

import permllm_vllm

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
INSTRUCTIONS = {
    *("FROM", "ARG", "RUN", "ENV", "WORKDIR", "COPY", "USER"),
    *("EXPOSE", "HEALTHCHECK", "ENTRYPOINT"),
}


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == permllm_vllm.__version__
    heads = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heads[0] == "Unreleased"
    assert heads[1] == project["version"]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, continued lines joined."""
    lines = [line for line in dockerfile.splitlines() if line and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines()]


def test_the_dockerfile_copies_what_is_there() -> None:
    found = instructions((ROOT / "Dockerfile").read_text())
    assert {name for name, _ in found} <= INSTRUCTIONS
    assert found[0][0] == "FROM"
    copied = [
        words.split()[:-1] for name, words in found if name == "COPY" and "--from" not in words
    ]
    assert all((ROOT / source).exists() for sources in copied for source in sources)
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    for name, words in found:
        if name == "FROM":
            assert words.split()[0] == f"python:{requires.removeprefix('>=')}-slim"
    assert ("USER", "server") in found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", target):
            assert (page.parent / target.partition("#")[0]).exists(), target
