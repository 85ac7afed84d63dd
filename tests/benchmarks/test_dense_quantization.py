"""What is measured of dense models in int8 and int4, and with what."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.dense_quantization import __main__ as command
from benchmarks.dense_quantization.__main__ import Evaluation
from benchmarks.dense_quantization.compressor import ONE_SHOT, Compressor
from benchmarks.dense_quantization.values import DENSE, KEY, KEYS, Key, name_of
from benchmarks.engines import quantized_peers
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.text.evaluation import perplexity
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama

TOKENS, WINDOWS = 32, 4


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_llama().bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_inputs_of_int8_are_rounded_as_served(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights to nearest; inputs on a grid for each token, whose end compressed-tensors puts in
    the middle of 127 and 128.
    """
    monkeypatch.setattr(command, "SEQUENCE_LENGTH", TOKENS)
    text = tmp_path / "text.txt"
    text.write_text(random_text(TOKENS * 5 * WINDOWS, seed=1))
    evaluation = Evaluation({"text": text}, load_tokenizer(open_source(str(model))), WINDOWS)
    found = evaluation.perplexities(quantized_peers.int8(model))["text"]

    def nearest(values: torch.Tensor, end: float) -> torch.Tensor:
        step = values.abs().amax(-1, keepdim=True) / end
        return (values / step).round().clamp(-128, 127) * step

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for name, linear in plain.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            linear.weight.data = nearest(linear.weight.data, 127)
            linear.register_forward_pre_hook(lambda _, inputs: (nearest(inputs[0], 127.5),))
    (windows,) = evaluation._windows.values()
    assert found == pytest.approx(perplexity(plain, windows), rel=1e-5)
    assert found != evaluation.perplexities(model)["text"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (DENSE, "dense bfloat16"),
        (("int8", None), "dense int8 (W8A8)"),
        (("int4", 64), "dense int4, groups of 64"),
    ],
)
def test_a_row_says_what_its_values_are(key: Key, name: str) -> None:
    assert name_of(dict(zip(KEY, key, strict=True))) == name
    assert key in KEYS


def test_a_python_without_llm_compressor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Python that can be run: No such file"):
        Compressor(tmp_path / "python")
    nothing = tmp_path / "nothing"
    nothing.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no packages
    nothing.chmod(0o755)
    with pytest.raises(ValueError, match=r"has no llm-compressor: give the Python of an env"):
        Compressor(nothing)


def test_what_is_asked_of_llm_compressor(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 9.9 || echo "$@" > {tmp_path}/asked\n')
    python.chmod(0o755)
    compressor = Compressor(python)
    assert compressor.version == "9.9"
    compressor.compress(Path("model"), Path("out"), ("int4", 64), Path("windows.pt"))
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == str(ONE_SHOT)
    assert asked[1:3] == ["model", "out"]
    assert asked[3:] == [*("--values", "int4", "--windows", "windows.pt", "--group", "64")]
