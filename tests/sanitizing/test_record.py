"""What `make sanitize` writes of itself, with steps that are only pretended."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.records import machine
from tests.sanitizing import __main__ as sanitizing


def test_a_record_names_the_sources_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = {
        **dict.fromkeys(("require_report", "require_failure", "build_harness", "sanitized_tree")),
        **dict.fromkeys(("compile_kernels", "compile_operators"), ()),
        **dict.fromkeys(("harness_calls", "passed_tests"), 3),
        "compile_with_overflow": Path("planted.o"),
        "emulated": False,
        "setup_module": SimpleNamespace(reason_not_to_build=lambda: ""),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(sanitizing, name, lambda *_, answer=answer: answer)
    file = tmp_path / "sanitize.json"
    monkeypatch.setattr(sanitizing, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(sanitizing, "revision", lambda: "one")
    monkeypatch.setattr(machine, "revision", lambda: "two")
    monkeypatch.setattr("sys.argv", ["sanitize", "--json", str(file)])
    sanitizing.main()
    found = json.loads(file.read_text())
    assert (found["commit"], found["kernel_calls"]) == ("one..two", 6)
