"""What two runs differ in is named, as far as a message has room."""

from permllm_offline.run.identity import differences, identity_text

FACTS = {
    "version": "1",
    "seed": 0,
    "learning": {"steps": 4, "layers": "all"},
    "dataset": ("a", "b"),
}


def test_equal_facts_are_equal_texts() -> None:
    assert identity_text(FACTS) == identity_text(dict(FACTS))
    assert identity_text(FACTS).count("\n") == len(FACTS)  # learning has two


def test_what_differs_is_named_with_both_values() -> None:
    other = FACTS | {"learning": {"steps": 5, "layers": "all"}}
    found = differences(identity_text(FACTS), identity_text(other))
    assert found == "learning.steps is 4 there and 5 here"
    other = {name: fact for name, fact in FACTS.items() if name != "seed"}
    found = differences(identity_text(other), identity_text(FACTS))
    assert found == "seed is not given there and 0 here"


def test_only_the_first_differences_are_named() -> None:
    there, here = (dict.fromkeys("abcde", number) for number in (1, 2))
    found = differences(identity_text({"z": 0} | there), identity_text({"z": 0} | here))
    assert found.split("; ")[2:] == ["c is 1 there and 2 here", "2 more"]


def test_a_text_of_another_form_is_of_another_version() -> None:
    assert differences("0123abcd", identity_text(FACTS)) == "another version wrote them"


def test_a_fact_of_several_lines_is_one_line() -> None:
    assert "\n" not in identity_text({"ignore": ("a\nseed: 1",)})
