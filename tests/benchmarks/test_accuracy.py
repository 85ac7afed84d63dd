"""Which rows the table of methods has."""

import argparse

import pytest

from benchmarks.accuracy import combinations, known_method, seeds_of, servable


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("wanda+cp", [4]),
        ("sparsegpt", [4]),
        ("wanda/obs+blockwise", [4, 5, 6]),
        ("wanda+cp/obs", [4]),
        ("permllm-ria", [4, 5, 6]),
        ("permllm-wanda/obs", [4, 5, 6]),
        ("permllm-best", [4, 5, 6]),
        ("permllm-best/obs", [4]),
        ("wanda/distillation", [4, 5, 6]),
    ],
)
def test_what_learns_has_every_seed(name: str, seeds: list[int]) -> None:
    assert list(seeds_of(name, [4, 5, 6])) == seeds


def test_permutations_through_a_whole_layer_are_not_servable() -> None:
    assert servable("wanda+cp")
    assert servable("permllm-best/obs")
    assert not servable("ria+cp-global")
    assert not servable("wanda+cp-global/obs")


def test_rows_come_in_the_order_of_the_table() -> None:
    names, values = ["wanda+cp-global", "permllm-wanda"], ["bfloat16", "int8"]
    assert list(combinations(names, ["2:4", "4:8"], [0, 1], values)) == [
        ("wanda+cp-global", "2:4", 0, "bfloat16"),
        ("permllm-wanda", "2:4", 0, "bfloat16"),
        ("permllm-wanda", "2:4", 0, "int8"),
        ("permllm-wanda", "2:4", 1, "bfloat16"),
        ("permllm-wanda", "2:4", 1, "int8"),
        ("wanda+cp-global", "4:8", 0, "bfloat16"),
        ("permllm-wanda", "4:8", 0, "bfloat16"),
        ("permllm-wanda", "4:8", 0, "int8"),
        ("permllm-wanda", "4:8", 1, "bfloat16"),
        ("permllm-wanda", "4:8", 1, "int8"),
    ]


@pytest.mark.parametrize("text", ["other", "wanda/other", "wanda/", ""])
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give METHOD or METHOD/RECONSTRUCTION"):
        known_method(text)
