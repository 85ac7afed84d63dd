"""An eager engine needs no C++ compiler, whatever vLLM decorates with torch.compile."""

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch._inductor import cpp_builder
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from permllm_vllm.vllm_workarounds.eager_helpers import keep_helpers_eager, missing_for_compiling


@torch.compile(backend="inductor", dynamic=True)
def helper(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + torch.compiler.is_compiling()


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    missing_for_compiling.cache_clear()
    with torch._dynamo.config.patch(disable=False), torch.compiler.set_stance("default"):
        yield  # behind it the stance is that of before, for the tests that follow
    missing_for_compiling.cache_clear()


def no_compiler() -> str:
    raise InvalidCxxCompiler


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", no_compiler)


def test_vllm_still_compiles_helpers_of_eager_engines() -> None:
    """Once this fails, vLLM compiles none of them: remove `vllm_workarounds/eager_helpers.py`."""
    from vllm.v1.sample.ops.logprobs import batched_count_greater_than

    assert hasattr(batched_count_greater_than, "_torchdynamo_orig_callable")


def test_without_a_compiler_helpers_run_as_they_are(nothing_installed: None) -> None:
    x = torch.ones(3)
    with pytest.raises(InductorError):
        helper(x)
    keep_helpers_eager(eager=True)
    torch.testing.assert_close(helper(x), torch.sin(x))


def test_without_pythons_header_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert missing_for_compiling() == "no header Python.h"
    (tmp_path / "Python.h").touch()
    missing_for_compiling.cache_clear()
    assert missing_for_compiling() == ""


def test_what_can_be_compiled_stays_so(
    monkeypatch: pytest.MonkeyPatch, nothing_installed: None
) -> None:
    keep_helpers_eager(eager=False)  # then vLLM compiles the model, and says what it lacks
    with pytest.raises(InductorError):
        helper(torch.ones(3))
    stances: list[str] = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", lambda: "c++")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    missing_for_compiling.cache_clear()
    keep_helpers_eager(eager=True)
    assert stances == []
