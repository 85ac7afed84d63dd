"""The one line of the server's log that says what serves."""

from collections.abc import Callable

import pytest
import torch
from vllm.model_executor.layers.linear import ReplicatedLinear

import permllm_vllm
from permllm_vllm.backends.cpu import instruction_sets
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.quantization import served
from tests.quantization.sparse_modules import config, load, permutation, sparse_module


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages: list[str] = []
    monkeypatch.setattr(served.logger, "info", lambda text, *args: messages.append(text % args))
    return messages


def build_and_load(dtype: torch.dtype, lines: list[str]) -> None:
    names = [f"model.fc{number}" for number in range(3)]
    configuration = config(names)
    layers = [
        ReplicatedLinear(
            128, 16, bias=False, params_dtype=dtype, quant_config=configuration, prefix=name
        )
        for name in names
    ]
    for layer in layers:
        assert lines == []
        load(layer, sparse_module(16, 128, local=permutation(128)))
        layer.quant_method.process_weights_after_loading(layer)


def test_once_after_the_last_layer(on_rank: Callable[[int, int], None], lines: list[str]) -> None:
    build_and_load(torch.float32, lines)
    assert lines == [
        f"PermLLM {permllm_vllm.__version__}: backend reference (pytorch) serves 3 sparse linear "
        "layers (2:4, float32 values, float32 activations)"
    ]


@pytest.mark.skipif(not instruction_sets(), reason="the CPU kernels were not built")
def test_names_the_instruction_set(
    on_rank: Callable[[int, int], None], lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    build_and_load(torch.bfloat16, lines)
    assert lines[0].endswith(
        "backend cpu (portable) serves 3 sparse linear layers "
        "(2:4, float32 values, bfloat16 activations)"
    )


def test_says_how_many_have_values_in_4_bits(lines: list[str]) -> None:
    layers, backend = served.ServedLayers(), ReferenceBackend(torch.bfloat16)
    checkpoint = config(value_dtype="int4").checkpoint
    for _ in range(3):
        layers.created()
    for _ in range(2):  # weights may be loaded again
        lines.clear()
        for four_bits in (True, False, True):
            layers.packed(backend, checkpoint, torch.bfloat16, four_bits=four_bits)
        assert lines[0].endswith(
            "3 sparse linear layers (2:4, int4 values, those of 2 in 4 bits, bfloat16 activations)"
        )


def test_a_fallback_is_warned_about_once(
    on_rank: Callable[[int, int], None], lines: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    build_and_load(torch.float32, lines)
    warned = [record for record in caplog.records if "reference backend" in record.message]
    assert len(warned) == 1
    assert "--dtype bfloat16" in warned[0].message
