"""The room imports torch, safetensors and pydantic alone, and its tensor functions torch alone."""

import ast
import sys
from pathlib import Path

import pytest

from permllm_vllm import checkpoint

MODULES = {path.stem: path for path in Path(checkpoint.__path__[0]).glob("*.py")}
TORCH_ALONE = {"errors", "numbers", "pattern", "packing", "permutation", "folding"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            assert node.module is not None
            names.add(node.module)
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_what_its_room_may(module: str) -> None:
    alone = module in TORCH_ALONE
    siblings = TORCH_ALONE if alone else MODULES
    allowed = {f"permllm_vllm.checkpoint.{name}" for name in siblings}
    libraries = {"torch"} if alone else {"torch", "safetensors", "pydantic", "pydantic_core"}
    for name in imported(MODULES[module]):
        assert name in allowed or name.split(".")[0] in libraries, f"{module} imports {name}"
