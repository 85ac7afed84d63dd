"""The small layer that is tried before a model is loaded, without a GPU."""

import pytest
import torch

from permllm_vllm import ops
from permllm_vllm.backends import PackedWeights, cuda, cuda_trial, fallback_reason
from tests.cuda.layers import decode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def multiply(x, packed, metadata, permutation, scale, bias, rows, pattern):
    """As the kernels do, with a dense weight."""
    with torch.device("cpu"):
        dense = decode(PackedWeights(packed, metadata, permutation, scale), rows, x.shape[1])
    return (x.double() @ dense.double().t()).to(x.dtype)


def test_a_right_result_is_the_expected_one(monkeypatch):
    monkeypatch.setattr(ops, "sparse_linear", multiply)
    assert cuda_trial.is_right(CPU)
    monkeypatch.setattr(ops, "sparse_linear", lambda *layer: multiply(*layer) + 1)
    assert not cuda_trial.is_right(CPU)


def test_our_kernel_gives_it(monkeypatch, emulator):
    def emulated(x, packed, metadata, permutation, scale, bias, rows, pattern):
        return emulator.linear(x, PackedWeights(packed, metadata, permutation, scale), bias, rows)

    monkeypatch.setattr(ops, "sparse_linear", emulated)
    assert cuda_trial.is_right(CPU)


def test_another_default_device_and_dtype_do_not_matter(monkeypatch):
    """As while vLLM loads a model."""
    monkeypatch.setattr(ops, "sparse_linear", multiply)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert cuda_trial.is_right(CPU)
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def tried(monkeypatch):
    """A GPU that should run the kernels, which raise `error[0]` or are wrong; counts trials."""
    error, trials = [""], []

    def is_right(device):
        trials.append(device)
        if error[0] not in ("", "wrong"):
            raise RuntimeError(error[0])
        return not error[0]

    monkeypatch.setattr(cuda, "unsupported_reason", lambda *_: "")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cuda_trial, "is_right", is_right)
    cuda_trial._failure.cache_clear()
    yield error, trials
    cuda_trial._failure.cache_clear()


def test_a_gpu_is_tried_once(tried):
    for device in (torch.device("cuda"), GPU, torch.device("cuda", 1), GPU):
        assert fallback_reason(device, torch.bfloat16) == ""
    assert tried[1] == [GPU, torch.device("cuda", 1)]


def test_an_error_is_the_reason(tried):
    error, trials = tried
    error[0] = "check(): the kernel for few tokens failed: unsupported toolchain. Remedy.\nmore"
    reason = fallback_reason(GPU, torch.bfloat16)
    assert reason == f"the CUDA kernels were tried on GPU 0 and do not run: {error[0][:-5]}"
    assert fallback_reason(GPU, torch.bfloat16) == reason
    assert trials == [GPU]


def test_a_wrong_result_is_a_reason(tried):
    tried[0][0] = "wrong"
    reason = fallback_reason(GPU, torch.bfloat16)
    assert "tried on GPU 0 and the result of a small layer is wrong: serve the dense" in reason


def test_what_cannot_run_is_not_tried(tried, monkeypatch):
    monkeypatch.setattr(cuda, "unsupported_reason", lambda *_: "no driver")
    assert fallback_reason(GPU, torch.bfloat16) == "no driver"
    assert tried[1] == []
