"""Commands that write a result as a whole: none replaces another's, and what is there is kept."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from benchmarks import demo, soak
from benchmarks.cuda import kernels
from benchmarks.texts import Texts


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (soak, "checkpoint"),
        (kernels, "run"),
    ],
)
def test_a_result_that_is_there_is_not_replaced(
    command: ModuleType,
    first: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "result.json"
    output.write_text("{}")
    monkeypatch.setattr(command, first, lambda *_: pytest.fail("it begins"))
    monkeypatch.setattr(sys, "argv", ["command", "--json", str(output)])
    with pytest.raises(SystemExit):
        command.main()
    assert "result.json is there, and a run adds nothing to it" in capsys.readouterr().err
    assert output.read_text() == "{}"


def test_a_demo_that_vllm_does_not_serve_keeps_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(*_: Any, **__: Any) -> list[dict[str, Any]]:
        return [{"variant": "dense"}, {"variant": "sparse", "refused": "no kernel"}]

    for name, answer in {
        "smollm2": tmp_path, "sotu": Texts(tmp_path, tmp_path), "evaluate": 20.0,
        "prune": None, "chat": "Paris",
        "inspect": SimpleNamespace(pattern="8:16", bytes=1, dense_bytes=2),
        "random_model": tmp_path, "magnitude_pruned": tmp_path,
    }.items():  # fmt: skip
        monkeypatch.setattr(demo, name, lambda *_, answer=answer, **__: answer)
    monkeypatch.setattr(demo, "compare", compare)
    monkeypatch.setattr(sys, "argv", ["demo", "--output", str(tmp_path)])
    with pytest.raises(SystemExit, match="vLLM does not serve the sparse model: no kernel"):
        demo.main()
    found = json.loads((tmp_path / "demo.json").read_text())
    assert (found["pattern"], found["pruned_linear_bytes"]["sparse"]) == ("8:16", 1)
    assert (found["answer"], found["decode"][1]["refused"]) == ("Paris", "no kernel")
