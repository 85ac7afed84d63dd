"""Version, changelog, Dockerfile and links agree with the tree."""

import re
import tomllib
from collections import Counter
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


def anchors(page: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    prose = re.sub(r"^(```|~~~).*?^\1", "", page, flags=re.MULTILINE | re.DOTALL)
    found: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#{1,6} +(.+?)[ #]*$", prose, re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w -]", "", shown.lower()).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if found[name] else name)
        found[name] += 1
    return names


def test_anchors_are_those_of_github() -> None:
    page = """# To *dense* `float32`, A100's way
```sh
# no heading
```
## [Tuned](tuning.md) -- twice_told
### Again
### Again ###
"""
    assert anchors(page) == {
        "to-dense-float32-a100s-way",
        "tuned----twice_told",
        "again",
        "again-1",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
