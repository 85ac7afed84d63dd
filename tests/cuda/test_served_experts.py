"""Experts as vLLM builds and fills them, packed for a GPU and multiplied on the emulated one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from permllm_vllm.backends import CudaBackend
from permllm_vllm.backends.weights import StackedWeights
from permllm_vllm.quantization import experts as method
from permllm_vllm.quantization import served
from tests.cuda.emulated import Emulator
from tests.quantization.conftest import vllm_config  # noqa: F401  (layers ask for it)
from tests.quantization.test_experts import (
    INTERMEDIATE,
    answer,
    chosen,
    expected,
    fill,
    layer,
    modules,
    relative,
    stored,
    to_int8,
)


@pytest.fixture(autouse=True)
def on_a_gpu(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backend of a GPU, and the operator there."""

    def multiply(x: Tensor, weights: Tensor, ids: Tensor, *operands: Any) -> Tensor:
        *tensors, inner, activation = operands
        gate_up, down = StackedWeights(*tensors[:4]), StackedWeights(*tensors[4:])
        return emulator.experts(x, weights, ids, gate_up, down, inner, activation)[0]

    monkeypatch.setattr(served, "select_backend", lambda *_: CudaBackend(torch.bfloat16))
    monkeypatch.setattr(method, "_sparse_experts", multiply)


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("down", ["folded", "input"])
def test_answers_as_loops_do(values: str, down: str) -> None:
    found = modules(down=f"{down}_permutation")
    found = to_int8(found) if values == "int8" else found
    experts = layer(values, down=down)
    fill(experts, stored(found))
    assert experts.quant_method.dense is None
    assert experts.w13_packed.element_size() == (1 if values == "int8" else 2)
    for tokens in (1, 5):
        x, weights, ids = chosen(tokens)
        y = answer(experts, x.bfloat16(), weights, ids)
        wanted = expected(found, x.bfloat16(), weights, ids, slice(None))
        assert relative(y, wanted) < 1e-2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_half_of_each_expert(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)
    found = modules()
    experts = layer(tp_size=2)
    fill(experts, stored(found))
    x, weights, ids = chosen(4)
    y = answer(experts, x.bfloat16(), weights, ids)
    half = INTERMEDIATE // 2
    wanted = expected(found, x.bfloat16(), weights, ids, slice(rank * half, rank * half + half))
    assert relative(y, wanted) < 1e-2


def test_weights_are_loaded_anew() -> None:
    """Into the memory of the first, which captured graphs read."""
    experts, second = layer(), modules(seed=1000)
    record_metadata_for_reloading(experts)
    fill(experts, stored(modules()))
    kept = [f"{name}_{operand}" for name in ("w13", "w2") for operand in ("packed", "metadata")]
    before = [getattr(experts, name).data_ptr() for name in kept]
    initialize_layerwise_reload(experts)
    list(experts.load_weights(stored(second)))
    finalize_layerwise_reload(experts, SimpleNamespace(dtype=torch.bfloat16))
    assert [getattr(experts, name).data_ptr() for name in kept] == before
    x, weights, ids = chosen(5)
    wanted = expected(second, x.bfloat16(), weights, ids, slice(None))
    assert relative(answer(experts, x.bfloat16(), weights, ids), wanted) < 1e-2
