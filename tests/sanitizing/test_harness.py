"""The quick form of `make sanitize`: the portable kernel alone, in a program of its own."""

from pathlib import Path

import pytest

from tests.sanitizing.build import MEMORY, build_harness, compile_kernels, run_harness, setup_module

REASON = setup_module().reason_not_to_build()
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON or "built")


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    kernels = compile_kernels(MEMORY, folder / "kernels", "portable")
    return build_harness(MEMORY, kernels, folder / "harness", "portable")


def test_the_portable_kernel_is_clean(harness: Path) -> None:
    result = run_harness(harness)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "calls, 1 instruction sets (portable)" in result.stdout


@pytest.mark.parametrize(
    ("plant", "report"),
    [("overflow", "heap-buffer-overflow"), ("undefined", "runtime error: shift exponent")],
)
def test_a_planted_bug_is_reported(harness: Path, plant: str, report: str) -> None:
    result = run_harness(harness, plant)
    assert result.returncode != 0
    assert report in result.stderr
