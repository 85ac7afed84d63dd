"""The command that measures quality, on a tiny model: what it makes, evaluates and goes on with."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import efforts
from benchmarks.efforts import Evaluation
from benchmarks.engines import quantized_peers
from benchmarks.pruning import checkpoints
from benchmarks.pruning.compressor import INSTALL, ONE_SHOT, Compressor
from benchmarks.texts import Texts
from permllm_offline.text.evaluation import perplexity
from permllm_vllm import ops
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama

TOKENS, WINDOWS = 32, 4


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, and texts for it, in place of the real ones."""
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().bfloat16().save_pretrained(folder)
    save_tokenizer(folder)
    text.write_text(random_text(TOKENS * 40 * WINDOWS, seed=1))
    monkeypatch.setattr(efforts, "SEQUENCE_LENGTH", TOKENS)
    monkeypatch.setattr(efforts, "CALIBRATION_WINDOWS", WINDOWS)
    monkeypatch.setattr(efforts, "REAL", {"tiny": lambda: folder})
    monkeypatch.setattr(efforts, "unseen_texts", lambda: {"text": text})
    for module in (efforts, checkpoints):
        monkeypatch.setattr(module, "sotu", lambda: Texts(text, text))
    return folder


def compressor(tmp_path: Path, does: str) -> Path:
    """A Python with llm-compressor 9.9, which does something with its arguments."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 9.9 || {does}\n')
    python.chmod(0o755)
    return python


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_rows_are_measured_once_with_bits_and_ratios(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    python = compressor(tmp_path, f'cp -r {model} "$3"')
    words = ["--model", "tiny", "--methods", "wanda", "--patterns", "2:4", "--efforts", "low"]
    words += ["--windows", "2", "--checkpoints", str(tmp_path / "made"), "--json", str(out)]
    for more in (
        ["--values", "bfloat16", "int8"],
        ["--values", "int8", "int4", "--compressor", str(python)],
    ):
        monkeypatch.setattr(sys, "argv", ["efforts", *words, *more])
        efforts.main()
    rows: dict[Any, Any] = {
        (row["pattern"], row["values"]): row for row in json.loads(out.read_text())["rows"]
    }
    assert list(rows) == [
        *((None, "bfloat16"), ("2:4", "bfloat16"), ("2:4", "int8")),
        *((None, "int8"), (None, "int4"), (None, "int3"), ("2:4", "int4")),
    ]
    bits = {key: row["bits_per_weight"] for key, row in rows.items()}
    assert [bits[None, values] for values in ("bfloat16", "int8", "int4", "int3")] == [
        *(16, 8, 4.25, 3.25)
    ]
    assert 5 < bits["2:4", "int8"] < 6  # scales weigh more in a tiny layer
    assert 3 < bits["2:4", "int4"] < bits["2:4", "int8"]
    dense = rows[None, "bfloat16"]["perplexity"]["text"]
    for row in rows.values():
        assert row["ratio"]["text"] == pytest.approx(row["perplexity"]["text"] / dense)
    assert rows["2:4", "int8"]["processor_seconds"] > 0
    monkeypatch.setattr(efforts.Qualities, "measured", lambda *_: pytest.fail("measured again"))
    efforts.main()


def test_inputs_of_int8_are_rounded_as_served(model: Path) -> None:
    """Weights to nearest; inputs on a grid for each token, whose end compressed-tensors puts in
    the middle of 127 and 128.
    """
    evaluation = Evaluation(model, WINDOWS)
    found = evaluation.quantized(quantized_peers.int8(model))["text"]

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
    assert found != evaluation.quantized(model)["text"]


def test_three_bits_survive_the_form_that_they_are_stored_in() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    values = torch.arange(-4, 4, dtype=torch.int8).repeat(4, 8)
    packed = pack_to_int32(values, 3)
    assert torch.equal(unpack_from_int32(packed, 3, values.shape), values)


def test_a_python_without_llm_compressor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no Python that can be run: No such file"):
        Compressor(tmp_path / "python")
    nothing = tmp_path / "nothing"
    nothing.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S "$@"\n')  # no packages
    nothing.chmod(0o755)
    with pytest.raises(ValueError, match=r"has no llm-compressor: give the Python of an env"):
        Compressor(nothing)
    assert INSTALL in str(efforts.__doc__)


def test_what_is_asked_of_llm_compressor(tmp_path: Path) -> None:
    found = Compressor(compressor(tmp_path, f'echo "$@" > {tmp_path}/asked'))
    assert found.version == "9.9"
    found.compress(Path("model"), Path("out"), 3, Path("windows.pt"))
    asked = (tmp_path / "asked").read_text().split()
    assert asked[0] == str(ONE_SHOT)
    assert asked[1:] == ["model", "out", *("--bits", "3", "--windows", "windows.pt")]
