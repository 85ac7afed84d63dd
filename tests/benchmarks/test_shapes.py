"""Shapes on the command line, and those of models."""

import argparse

import pytest

from benchmarks.shapes import parse_shape, random_layer


def test_a_shape_is_outputs_x_inputs() -> None:
    assert parse_shape("4096x11008") == (4096, 11008)


@pytest.mark.parametrize(
    "text", ["3y4", "4096", "4096x", "0x64", "-1x64", "1.5x64", "64x64x64", ""]
)
def test_another_form_is_named_with_an_example(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"'.*' is no shape: .* as 4096x11008"):
        parse_shape(text)


@pytest.mark.parametrize(("pattern", "group", "kept"), [("2:4", 4, 2), ("4:8", 8, 4)])
def test_a_layer_by_magnitude_keeps_the_largest(pattern: str, group: int, kept: int) -> None:
    layer, any_of_them = (
        random_layer(32, 256, pattern, permuted=False, by_magnitude=by_magnitude)
        for by_magnitude in (True, False)
    )
    groups = layer.dense.unflatten(-1, (-1, group))
    assert ((groups != 0).sum(-1) == kept).all()
    assert layer.dense.float().square().sum() > 1.4 * any_of_them.dense.float().square().sum()
