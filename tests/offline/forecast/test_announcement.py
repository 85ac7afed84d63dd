"""What a prune will take is said before it begins, and never stands in its way."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.cli import main
from permllm_offline.forecast import announcement, duration
from permllm_offline.forecast.announcement import warn_of_slow_float16
from permllm_offline.forecast.duration import dtype_gain, measured_speed
from permllm_offline.preparation.prepared import Prepared, prepare, windows_to_come
from permllm_offline.preparation.recipe_input import make_recipe

SIZES = ("--num-samples", "8", "--sequence-length", "20", "--method", "wanda")


def prune(model: Path, text: Path, output: Path) -> int:
    return main(
        ["prune", str(model), "--output", str(output), "--dataset", str(text), *SIZES]
    )  # fmt: skip


def test_a_prune_says_what_it_will_take_before_text_is_drawn(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []

    def drawn(*_: Any, **__: Any) -> None:
        said.append(capsys.readouterr().err)
        raise KeyboardInterrupt

    monkeypatch.setattr("permllm_offline.preparation.prepared.sample_windows", drawn)
    assert prune(tiny_model_directory, text_file, tmp_path / "out") == 130
    time, memory, disk = said[0].splitlines()
    assert " for decoder layers one by one (estimates from a layer timed" in time
    assert memory.startswith("peak memory about ")
    assert " GB of disk: the checkpoint, and what a run that is cut off" in disk


def test_without_a_forecast_a_prune_goes_well(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(announcement, "forecast", fail)
    assert prune(tiny_model_directory, text_file, tmp_path / "out") == 0
    assert "peak memory" not in capsys.readouterr().err


@pytest.fixture
def prepared(tiny_model_directory: Path, text_file: Path) -> Prepared:
    entries = {"model": str(tiny_model_directory), "dataset": str(text_file)}
    return prepare(
        make_recipe(entries | {"method": "wanda", "num_samples": 8, "sequence_length": 20})
    )


@pytest.mark.parametrize(
    ("dtype", "device", "gain", "warned"),
    [
        (torch.float16, "cpu", 8.4, True),
        (torch.float16, "cpu", 1.3, False),
        (torch.bfloat16, "cpu", 8.4, False),
        (torch.float16, "cuda", 8.4, False),
    ],
)
def test_a_slow_dtype_is_named_with_its_remedy(
    dtype: torch.dtype,
    device: str,
    gain: float,
    warned: bool,
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(announcement, "dtype_gain", lambda *_: gain)
    of_model = replace(prepared, dtype=dtype, device=torch.device(device))
    recipe = make_recipe({"model": "m"})
    warn_of_slow_float16(recipe, of_model)
    assert len(caplog.messages) == warned
    if warned:
        assert "multiplies bfloat16 about 8 times as fast" in caplog.text
        assert "round kept values anyway: --dtype bfloat16 prunes sooner" in caplog.text
        warn_of_slow_float16(recipe.model_copy(update={"values": "int8"}), of_model)
        assert "round kept values" not in caplog.messages[1]


def test_a_gain_is_a_ratio_of_speeds(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {torch.float32: 2.0, torch.bfloat16: 6.0}
    monkeypatch.setattr(duration, "measured_speed", lambda of, _: speeds[of.dtype])
    assert dtype_gain(prepared, torch.bfloat16) == 3


@pytest.mark.parametrize(("length", "timed"), [(20, 20), (4096, 512)])
def test_long_windows_take_no_longer_to_time(
    length: int, timed: int, prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe({"model": "m", "dataset": "t", "sequence_length": length})
    original, tokens = torch.nn.functional.linear, set()

    def linear(inputs: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        tokens.add(len(inputs))
        return original(inputs, *weights)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    of_length = replace(prepared, windows=windows_to_come(recipe))
    assert measured_speed(of_length, prepared.plan.linears[0]) > 0
    assert tokens == {timed}
