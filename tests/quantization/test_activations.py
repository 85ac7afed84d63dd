"""Which activations the kernel takes over, and that it does not stand in a user's way."""

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch.nn import Module, ModuleList
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.activation import MulAndSilu, NewGELU, SiluAndMulWithClamp

from permllm_vllm import ops
from permllm_vllm.compat import GeluAndMul, SiluAndMul
from permllm_vllm.quantization.activations import activate_by_kernel

needs_kernel = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason)


@pytest.fixture
def gated() -> Iterator[ModuleList]:
    """What the kernel takes over, built as an eager engine builds it."""
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))
    with set_current_vllm_config(config):
        yield ModuleList([SiluAndMul(), GeluAndMul(approximate="tanh")])


def by_kernel(model: Module) -> list[bool]:
    return ["permllm" in module._forward_method.__module__ for module in model.children()]


@needs_kernel
def test_an_eager_engine_has_the_kernel_and_a_compiled_one_has_inductor(gated: ModuleList) -> None:
    x = torch.randn(3, 64).bfloat16()
    before = [module(x) for module in gated]
    activate_by_kernel(gated, eager=False)
    assert by_kernel(gated) == [False, False]
    activate_by_kernel(gated, eager=True)
    activate_by_kernel(gated, eager=True)
    assert by_kernel(gated) == [True, True]
    for module, expected in zip(gated, before, strict=True):
        torch.testing.assert_close(module(x), expected)


@needs_kernel
def test_others_stay(gated: ModuleList) -> None:
    """Of other formulas, of other classes, and of those that derive from the two."""
    others = ModuleList(
        [GeluAndMul(approximate="none"), MulAndSilu(), NewGELU(), SiluAndMulWithClamp(7.0)]
    )
    activate_by_kernel(others, eager=True)
    assert by_kernel(others) == [False] * len(others)


@needs_kernel
def test_operators_that_a_user_turned_off_stay_off() -> None:
    config = VllmConfig(compilation_config=CompilationConfig(custom_ops=["none"]))
    with set_current_vllm_config(config):
        model = ModuleList([SiluAndMul()])
    activate_by_kernel(model, eager=True)
    assert by_kernel(model) == [False]


def test_without_a_kernel_nothing_changes(
    gated: ModuleList, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "missing_reason", "was not built")
    activate_by_kernel(gated, eager=True)
    assert by_kernel(gated) == [False, False]
