"""What the packages import, the distribution asks for: an environment without it would fail.

Installed wheels are tested beside the libraries of the development environment, where none is
missing. vLLM, which the plugin is loaded by, is chosen by whoever installs.
"""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGES = (ROOT / "permllm_vllm", ROOT / "offline" / "permllm_offline")
HOST = "vllm"
NAMES = {"yaml": "pyyaml"}  # of distributions that are not called what is imported
EXTRAS = ("cpu", "cuda", "eval")


def libraries(node: ast.AST) -> Iterator[str]:
    """Import names of others that a statement imports."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module is not None:
        names = [node.module]
    else:
        names = []
    ours = {package.name for package in PACKAGES}
    for name in {name.partition(".")[0] for name in names} - ours - {HOST}:
        if name not in sys.stdlib_module_names:
            yield name


@cache
def modules() -> list[ast.Module]:
    return [ast.parse(path.read_text()) for root in PACKAGES for path in root.rglob("*.py")]


def imported(*, always: bool) -> set[str]:
    """Libraries that importing a module imports too, or those of any of its functions."""
    nodes = (node for module in modules() for node in (module.body if always else ast.walk(module)))
    return {name for node in nodes for name in libraries(node)}


def requirements(*files: str) -> list[Requirement]:
    lines = [
        line.partition("#")[0].strip()
        for file in files
        for line in (ROOT / "requirements" / f"{file}.txt").read_text().splitlines()
    ]
    return [Requirement(line) for line in lines if line]


def undeclared(libraries: set[str], *files: str) -> set[str]:
    """Those that no requirement installs."""
    declared = {canonicalize_name(one.name) for one in requirements(*files)}
    names = {library: canonicalize_name(NAMES.get(library, library)) for library in libraries}
    return {library for library, name in names.items() if name not in declared}


def test_what_modules_need_is_required() -> None:
    needed = imported(always=True)
    assert {"torch", "yaml", "packaging"} <= needed
    assert undeclared(needed, "base") == set(), "add them to requirements/base.txt"


def test_what_functions_need_is_required_or_an_extra() -> None:
    needed = imported(always=False)
    assert {"pyarrow", "lm_eval"} <= needed
    assert undeclared(needed, "base", *EXTRAS) == set(), "add them to requirements"


def test_every_requirement_has_a_lower_bound() -> None:
    for one in requirements("base"):
        assert [bound.operator for bound in one.specifier] == [">="], one
