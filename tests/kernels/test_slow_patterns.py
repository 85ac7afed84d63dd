"""Kernels that run a pattern below full speed say so once, with the factor and the remedy."""

import pytest

from permllm_vllm.backends import cpu


@pytest.fixture(autouse=True)
def nothing_said() -> None:
    cpu._warn_of_slow.cache_clear()


@pytest.mark.parametrize(
    ("pattern", "isa"),
    [("2:4", "avx2"), ("8:16", "portable"), ("8:16", "amx"), ("32:64", "amx"), ("32:64", "avx512")],
)
def test_nothing_is_said_at_full_speed(
    pattern: str, isa: str, caplog: pytest.LogCaptureFixture
) -> None:
    cpu._warn_of_slow(pattern, isa)
    assert caplog.text == ""


def test_the_factor_and_the_remedy_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        cpu._warn_of_slow("32:64", "zen5")
    [record] = caplog.records
    assert "32:64 run up to 1.6 times as long on zen5" in record.getMessage()
    assert record.getMessage().endswith("prune with --pattern 8:16 if speed matters more")
