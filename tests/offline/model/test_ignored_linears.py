"""Entries of `ignore`: what they leave dense, and what is refused."""

import shlex

import pytest

from permllm_offline.errors import OfflineError
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.ignored_linears import ignored_linears
from permllm_vllm.checkpoint.ignoring import matches

FAMILY = FAMILIES["llama"]
GROUPS = [
    [f"{FAMILY.layer_name(index)}.{linear}" for linear in group.linears]
    for index in range(12)
    for group in FAMILY.groups
]
NAMES = [name for group in GROUPS for name in group]


def ignored(*entries: str) -> set[str]:
    return set(ignored_linears(entries, GROUPS, FAMILY.ignore))


def test_expressions_of_the_family_count_too() -> None:
    entries = [rf"re:.*{number}\.down_proj" for number in range(100)]
    with pytest.raises(OfflineError, match="101 regular expressions; at most 100 are read"):
        ignored_linears(entries, GROUPS, ["re:lm_head"])


def test_nothing_is_ignored_unasked() -> None:
    assert ignored() == set()


@pytest.mark.parametrize(
    ("entries", "test"),
    [
        (["model.layers.1.mlp.down_proj"], lambda n: n == "model.layers.1.mlp.down_proj"),
        ([r"re:.*\.down_proj"], lambda n: n.endswith(".down_proj")),
        ([r"re:model\.layers\.(0|11)\..*"], lambda n: n.split(".")[2] in ("0", "11")),
        (
            [r"re:.*\.(gate|up)_proj", "model.layers.3.self_attn.o_proj"],
            lambda n: n.endswith(("gate_proj", "up_proj")) or n.endswith("3.self_attn.o_proj"),
        ),
        # A group may be named by several entries, and a linear by more than one.
        (
            [r"re:.*1\.self_attn\.[qk]_proj", r"re:.*\.v_proj", r"re:.*\.[qk]_proj"],
            lambda n: n.endswith(("q_proj", "k_proj", "v_proj")),
        ),
    ],
)
def test_what_entries_leave_dense(entries: list[str], test: object) -> None:
    assert callable(test)
    assert ignored(*entries) == set(filter(test, NAMES))


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        # The parent of linears, and the end of a name: both are expressions.
        ("model.layers.1", r"re:model\.layers\.1\..*"),
        ("mlp", r"re:.*mlp.*"),
        ("down_proj", r"re:.*\.down_proj"),
        ("mlp.down_proj", r"re:.*\.mlp\.down_proj"),
        # An expression that matches a part of a name, and one that lacks its mark.
        ("re:down_proj", r"re:.*\.down_proj"),
        ("re:down", r"re:.*down.*"),
        (r".*\.down_proj", r"re:.*\.down_proj"),
        ("re:down|up", r"re:.*(?:down|up).*"),
        ("model.layers.12.mlp.down_proj", "model.layers.2.mlp.down_proj"),
        ("model.layers.1.mlp.down_prj", "model.layers.1.mlp.down_proj"),
        ("anything", "model.layers.0.self_attn.q_proj"),
        ("", "model.layers.0.self_attn.q_proj"),
        ("re:", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_an_entry_that_matches_nothing_has_near_ones(entry: str, near: str) -> None:
    with pytest.raises(OfflineError, match="matches no linear layer that would be pruned") as error:
        ignored(r"re:.*\.o_proj", entry)
    asked = shlex.split(str(error.value).rpartition("Did you mean ")[2].removesuffix("?"))
    assert near in asked
    for other in filter(lambda word: word != "or", asked):
        assert any(matches(other, name) for name in NAMES)


@pytest.mark.parametrize("entry", ["lm_head", "re:.*lm_head"])
def test_what_is_dense_anyway_is_no_entry(entry: str) -> None:
    with pytest.raises(OfflineError, match=r"--ignore .*lm_head says nothing.*Leave it out"):
        ignored(entry)


@pytest.mark.parametrize(
    ("entry", "others"),
    [
        ("model.layers.0.self_attn.q_proj", ["k_proj", "v_proj"]),
        (r"re:.*\.[kv]_proj", ["q_proj"]),
        (r"re:.*\.gate_proj", ["up_proj"]),
    ],
)
def test_a_part_of_what_shares_an_input_is_refused(entry: str, others: list[str]) -> None:
    with pytest.raises(OfflineError, match="Ignore all of them or none") as error:
        ignored(entry)
    parent = "model.layers.0." + ("mlp." if others == ["up_proj"] else "self_attn.")
    assert f"but not {', '.join(parent + other for other in others)}:" in str(error.value)


@pytest.mark.parametrize("entries", [["re:.*"], [r"re:.*_proj"], NAMES])
def test_something_is_left_to_prune(entries: list[str]) -> None:
    with pytest.raises(OfflineError, match=f"leaves all {len(NAMES)} linear layers dense"):
        ignored(*entries)


@pytest.mark.parametrize("regex", ["(", "(?=a)", r"(a)\1", "a" * 301])
def test_an_expression_that_no_reader_could_match_is_refused(regex: str) -> None:
    with pytest.raises(OfflineError, match=r"--ignore cannot be used: .*Give other entries"):
        ignored(f"re:{regex}")


def test_no_more_expressions_than_are_read() -> None:
    with pytest.raises(OfflineError, match="101 regular expressions; at most 100 are read"):
        ignored(*[rf"re:model\.layers\.0\..*|{n}" for n in range(101)])
