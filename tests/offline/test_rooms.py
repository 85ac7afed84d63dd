"""The folders of the package depend on each other in one direction."""

import ast
from pathlib import Path

import pytest

import permllm_offline

ROOT = Path(permllm_offline.__file__).parent
ROOMS = (
    "openmp",
    "errors",
    "run",
    "model",
    "text",
    "sparsity",
    "recipe",
    "calibration",
    "permutation",
    "reconstruction",
    "preparation",
    "report",
    "pruning",
    "forecast",
    "inspection",
    "conversion",
    "hub",
    "pipeline",
    "unused_options",
    "api",
    "commands",
    "cli",
    "__main__",
)
"""Folders and modules at the top of the package: each may import those before it."""
LAZY = "__init__"
"""The package itself, which has the functions of ``api`` when they are asked for."""


def imported(room: str) -> dict[str, set[str]]:
    """First names below the package that each file of a room imports, wherever it does."""
    folder = ROOT / room
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")) if folder.is_dir() else [ROOT / f"{room}.py"]:
        names = found.setdefault(str(file.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {below(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level:
                pytest.fail(f"{file} imports relatively, which is not looked at")
            elif isinstance(node, ast.ImportFrom) and node.module == "permllm_offline":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                names.add(below(node.module))
    return found


def below(module: str) -> str:
    """The first name of a module below the package, empty for others."""
    package, _, rest = module.partition(".")
    return rest.partition(".")[0] if package == "permllm_offline" else ""


def test_every_room_has_its_place() -> None:
    modules = {file.stem for file in ROOT.glob("*.py")} - {LAZY}
    folders = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert modules | folders == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_needs_only_those_before_it(room: str) -> None:
    allowed = {"", room, *ROOMS[: ROOMS.index(room)]}
    for file, names in imported(room).items():
        assert names <= allowed, f"{file} imports {sorted(names - allowed)}"
