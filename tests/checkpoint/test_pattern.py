import pytest

from permllm_vllm.checkpoint.pattern import Pattern


@pytest.mark.parametrize(
    ("text", "kept", "group"), [("2:4", 2, 4), ("4:8", 4, 8), ("8:16", 8, 16), ("32:64", 32, 64)]
)
def test_pattern_reads_and_writes(text: str, kept: int, group: int) -> None:
    assert Pattern.parse(text) == (kept, group)
    assert str(Pattern(kept, group)) == text


@pytest.mark.parametrize(
    "text", ["", "2:3", "1:4", "2:8", "4:2", "2/4", " 2:4", "two:four", "16:32", "8:15"]
)
def test_other_patterns_are_refused_with_the_choices(text: str) -> None:
    with pytest.raises(ValueError, match="use one of 2:4, 4:8, 8:16, 32:64") as refusal:
        Pattern.parse(text)
    assert repr(text) in str(refusal.value)
