from pathlib import Path
from typing import Any

import pytest

from permllm_offline.cli import main
from permllm_offline.forecast import Forecast, forecast, measured_speed
from permllm_offline.preparation import prepare
from permllm_offline.recipe import make_recipe

WEIGHTS = 128 * 128 * 2 + 64 * 128 * 2 + 128 * 192 * 3
"""Of one decoder layer of the tiny model: q and o, k and v, gate and up and down."""


@pytest.fixture
def expect(tiny_model_directory: Path, text_file: Path) -> Any:
    def expect(**options: Any) -> Forecast:
        entries = {"dataset": str(text_file), "num_samples": 10, "sequence_length": 20}
        entries |= {"model": str(tiny_model_directory), "evaluation_windows": 0}
        recipe = make_recipe(entries | options)
        return forecast(recipe, prepare(recipe), speed=1e6)

    return expect


def test_one_pass_of_the_calibration_text(expect: Any) -> None:
    found = expect(method="wanda")
    assert found.layer_seconds == pytest.approx([2 * 200 * WEIGHTS / 1e6] * 2)
    assert found.learning_seconds == 0
    assert expect(method="magnitude").seconds == 0


def test_held_out_windows_pass_dense_and_pruned(expect: Any) -> None:
    more = expect(method="magnitude", evaluation_windows=5)
    assert more.layer_seconds == pytest.approx([2 * 2 * 100 * WEIGHTS / 1e6] * 2)


def test_updates_and_learning_take_longer(expect: Any) -> None:
    wanda = expect(method="wanda")
    assert expect(method="sparsegpt").seconds > 3 * wanda.seconds
    short, long = (expect(method="permllm-wanda", learning={"steps": steps}) for steps in (10, 20))
    assert long.learning_seconds == pytest.approx(2 * short.learning_seconds)
    assert short.layer_seconds == wanda.layer_seconds
    best = expect(method="permllm-best", num_samples=10, learning={"steps": 10})
    assert best.learning_seconds > short.learning_seconds


def test_streamed_layers_need_less_memory(expect: Any) -> None:
    # With two layers the difference is in what is not streamed; more text needs more memory.
    assert expect(method="wanda").peak_bytes <= expect(method="permllm-wanda").peak_bytes
    few = expect(method="wanda", num_samples=5)
    assert expect(method="wanda").peak_bytes - few.peak_bytes == 3 * 5 * 20 * 128 * 4


def test_the_speed_is_measured(tiny_model_directory: Path) -> None:
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    prepared = prepare(recipe)
    assert measured_speed(prepared, prepared.plan.linears[0]) > 0


def test_a_dry_run_says_it(
    tmp_path: Path,
    tiny_model_directory: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ("--method", "magnitude", "--dry-run")
    assert (
        main(["prune", str(tiny_model_directory), "--output", str(tmp_path / "o"), *options]) == 0
    )
    shown = capsys.readouterr().out
    assert "for each decoder layer" in shown
    assert "peak memory about 0.00 GB" in shown
