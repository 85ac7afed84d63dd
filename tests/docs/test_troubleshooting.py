"""Every message that docs/troubleshooting.md quotes is still written somewhere in the sources."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "troubleshooting.md"
VARIES = "…"
GAP = "\0"  # where a literal has a placeholder
OF_VLLM = {
    "Unknown quantization method: permllm": "config/model.py",
    "is less than desired CPU memory utilization (": "v1/worker/cpu_worker.py",
    "Not enough allowed NUMA nodes to bind threads of 2": "utils/ompmultiprocessing.py",
    "is less than requested memory for kv": "v1/worker/cpu_worker.py",
    "To serve at least one request with the model's max seq len": "v1/core/kv_cache_utils.py",
}
"""Each without its last word, which vLLM puts in."""
OF_PYTHON = (
    "No package metadata was found for vllm",
    "No matching distribution found for torch",
    "The virtual environment was not created successfully",
    "fatal error: Python.h: No such file or directory",
    "No working C++ compiler found",
)
"""And of its compiler, and of torch's search for one."""


def quoted() -> list[str]:
    """The first code span of every row of every table."""
    rows = re.findall(r"^\| `([^`]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return [row for row in rows if row not in OF_VLLM and row not in OF_PYTHON]


def python_literals(source: str) -> Iterator[str]:
    """Every string of a Python file, its placeholders replaced by gaps."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) else GAP for part in node.values
            )


def cpp_literals(source: str) -> Iterator[str]:
    """The strings of every check of a C++ file, what stands between them replaced by a gap.

    And of every text that is printed to a buffer.
    """
    for check in re.findall(r"(?:STD_TORCH_CHECK|snprintf)\((.*?)\);", source, re.DOTALL):
        joined = re.sub(r'"\s+"', "", check).replace("%zu", GAP)
        parts = re.findall(r'"((?:[^"\\]|\\.)*)"', joined)
        yield GAP.join(part.replace('\\"', '"') for part in parts)


@cache
def literals() -> tuple[str, ...]:
    python = [ROOT / "setup.py", *(ROOT / "permllm_vllm").rglob("*.py")]
    python += (ROOT / "offline").rglob("*.py")
    found: list[str] = []
    for path in python:
        found += python_literals(path.read_text(encoding="utf-8"))
    for path in (path for kind in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(kind)):
        found += cpp_literals(path.read_text(encoding="utf-8"))
    return tuple(found)


def is_written(message: str) -> bool:
    """Whether one literal has the fixed parts of a message, in order."""
    parts = [re.escape(part.strip()) for part in message.split(VARIES) if part.strip()]
    pattern = re.compile(".*".join(parts), re.DOTALL)
    return any(pattern.search(literal) for literal in literals())


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_still_written(message: str) -> None:
    assert is_written(message)


def test_the_test_can_fail() -> None:
    assert len(quoted()) > 40
    assert not is_written("this message was never written")
    assert not is_written("remedy: … found …; rule:")


def raised() -> list[str]:
    """What the command line tells its user: the first argument of every OfflineError."""
    found: list[str] = []
    for path in sorted((ROOT / "offline").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "OfflineError":
                continue
            texts = list(python_literals(ast.unparse(node.args[0]))) if node.args else []
            if texts:
                found.append(max(texts, key=len))
    return found


@pytest.mark.parametrize("message", raised())
def test_every_message_of_the_command_has_a_row(message: str) -> None:
    parts = [[re.escape(p.strip()) for p in row.split(VARIES) if p.strip()] for row in quoted()]
    rows = [re.compile(".*".join(row), re.DOTALL) for row in parts]
    only_quotes = not message.replace(GAP, "").strip(" :.;,")
    assert only_quotes or any(row.search(message) for row in rows)


@pytest.mark.parametrize("message", OF_VLLM)
def test_a_message_of_vllm_is_still_written(message: str) -> None:
    specification = importlib.util.find_spec("vllm")
    if specification is None or specification.origin is None:
        pytest.skip("vLLM is not installed")
    text = (Path(specification.origin).parent / OF_VLLM[message]).read_text(encoding="utf-8")
    assert message.rpartition(" ")[0] in text
    assert message in PAGE.read_text(encoding="utf-8")
