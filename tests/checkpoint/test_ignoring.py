import re
import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.checkpoint.ignoring import check_entries, matches

PIECES = (
    "a",
    "b",
    "0",
    r"\.",
    ".",
    "[ab]",
    "[^a]",
    r"\d",
    "a*",
    ".*",
    "b+",
    "0?",
    "(a|b0)",
    "(a|a)*",
)


@given(st.lists(st.sampled_from(PIECES), max_size=6), st.text("ab0.\n", max_size=8))
def test_ordinary_expressions_mean_what_they_mean_in_python(pieces: list[str], name: str) -> None:
    regex = "".join(pieces)
    assert matches(f"re:{regex}", name) == (re.fullmatch(regex, name) is not None)


def test_a_plain_name_is_no_expression() -> None:
    assert matches("a.b", "a.b")
    assert not matches("a.b", "axb")


@pytest.mark.parametrize("regex", ["(a*)*b", "(a|a)*b", "(a?){40}a{40}b", "(.*a){12}b"])
def test_no_expression_takes_exponential_time(regex: str) -> None:
    """Python's `re` would not end within the test run; this takes next to no processor time."""
    check_entries([f"re:{regex}"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    assert not matches(f"re:{regex}", "a" * 1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 30
