"""A GPU that nobody named is pointed out once, by what would leave it alone."""

from pathlib import Path

import pytest
import torch

from permllm_offline.api import asked_recipe
from permllm_offline.cli import main
from permllm_offline.run import device
from permllm_offline.run.device import chosen_device

SAID = "a GPU is here and the CPU computes: --device cuda uses it"


@pytest.mark.parametrize("here", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_it_is_named_where_it_is_here_and_no_device_is_given(
    here: bool,
    is_first: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
    monkeypatch.setattr(device, "first", lambda: is_first)
    assert chosen_device("cpu") == "cpu"
    assert chosen_device("cuda:1") == "cuda:1"
    assert not caplog.messages
    assert chosen_device(None) == "cpu"
    assert (SAID in caplog.text) == (here and is_first)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_prune_and_eval_name_it(
    device: str | None,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made = asked_recipe({"model": "m", "device": device})
    assert made.device == "cpu"
    options = ["--dataset", str(text_file), "--sequence-length", "24", "--max-windows", "1"]
    options += [] if device is None else ["--device", device]
    assert main(["eval", str(tiny_model_directory), *options]) == 0
    assert caplog.text.count(SAID) == (2 if device is None else 0)
