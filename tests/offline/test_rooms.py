"""The folders of the package depend on each other in one direction."""

import ast
from pathlib import Path

import pytest

import permllm_offline

ROOT = Path(permllm_offline.__file__).parent
NEEDS = {
    "model": {"errors", "local_path"},
    "text": {"errors", "local_path", "model"},
    "run": {"errors"},
}
"""What the lowest folders may import beside themselves."""
HIGH = {"report", "pipeline", "pruning", "streamed_pruning", "commands", "api", "cli"}
HIGH |= {"recipe", "method_parts"}
"""What the folders of the method must not know."""


def imported(folder: str) -> dict[str, set[str]]:
    """First names below the package that each file of a folder imports."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / folder).glob("*.py")):
        names = found.setdefault(file.name, set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module is not None:
                package, _, rest = node.module.partition(".")
                if package == "permllm_offline":
                    names |= {rest.partition(".")[0]} if rest else {a.name for a in node.names}
    return found


@pytest.mark.parametrize("folder", list(NEEDS))
def test_low_folders_need_little(folder: str) -> None:
    for file, names in imported(folder).items():
        assert names <= NEEDS[folder] | {folder}, file


@pytest.mark.parametrize("folder", ["permutation", "reconstruction"])
def test_the_method_does_not_know_who_asks(folder: str) -> None:
    for file, names in imported(folder).items():
        assert names.isdisjoint(HIGH), file
