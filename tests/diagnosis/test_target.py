"""What kind of device this machine is: the kernels are asked, or the processor without them."""

import pytest
import torch

from permllm_vllm import ops
from permllm_vllm.diagnosis import target
from permllm_vllm.diagnosis.target import detected  # before tests replace it


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2"}, "cpu"),
        ({"avx512f", "avx512_bf16"}, "cpu"),
        ({"amx_tile", "amx_int8"}, "cpu"),
        ({"amx_tile", "amx_int8", "amx_bf16", "avx2"}, "amx"),
    ],
)
def test_the_processor_is_asked_where_nothing_is_compiled(
    flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "missing_reason", "not built")
    monkeypatch.setattr(target, "processor", lambda: ("a processor", flags))
    assert detected() == expected


@pytest.mark.parametrize(
    ("sets", "expected"), [(["amx", "avx2"], "amx"), (["zen5"], "cpu"), ([], "cpu")]
)
def test_the_kernels_are_asked_where_they_are_compiled(
    sets: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They know what Linux grants them, which the flags of the processor do not tell."""
    monkeypatch.setattr(ops, "missing_reason", "")
    monkeypatch.setattr(target, "instruction_sets", lambda: sets)
    monkeypatch.setattr(target, "processor", lambda: ("", target.AMX_FEATURES))
    assert detected() == expected


@pytest.mark.parametrize(
    ("capability", "is_gpu"), [((9, 0), True), ((8, 0), True), ((7, 5), False)]
)
def test_a_gpu_with_sparse_tensor_cores_comes_first(
    capability: tuple[int, int], is_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (detected() == "gpu") == is_gpu
