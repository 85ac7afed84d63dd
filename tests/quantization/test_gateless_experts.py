"""Experts without a gate on a CPU: built, multiplied, cut to a rank; what stays refused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEFactory
from vllm.model_executor.layers.fused_moe import config as moe_config

from permllm_vllm.quantization.gateless_experts import (
    dense_experts_method,
    gateless_experts_accepted,
)
from tests.quantization.sparse_modules import config, permutation, sparse_module
from tests.quantization.test_experts import Modules, answer, chosen, fill, relative, stored

EXPERTS, CHOICES, HIDDEN, INTERMEDIATE = 3, 2, 128, 128
PREFIX = "model.layers.0.mixer.experts"
UP, DOWN = ([f"{PREFIX}.{expert}.{leaf}" for expert in range(EXPERTS)] for leaf in
            ("up_proj", "down_proj"))  # fmt: skip


def modules(dtype: torch.dtype = torch.bfloat16) -> Modules:
    """Up is permuted at run time, the permutation of down is folded."""
    kinds = {"input_permutation": UP, "folded_permutation": DOWN}
    return {
        name: sparse_module(
            HIDDEN, HIDDEN, local=permutation(HIDDEN, seed=at), kind=kind, seed=at, dtype=dtype
        )
        for kind, names in kinds.items()
        for at, name in enumerate(names)
    }


def layer(dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    """The experts of a layer, as a model class of vLLM would build them."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    one_process = {"tp_size": 1, "dp_size": 1, "pcp_size": 1}
    form = {"activation": "relu2_no_mul", "ckpt_names": ("up_proj", "down_proj", None)}
    runner = FusedMoEFactory(
        EXPERTS,
        CHOICES,
        params_dtype=dtype,
        quant_config=config(
            runtime_permuted=UP, folded=DOWN, value_dtype=str(dtype).removeprefix("torch.")
        ),
        prefix=PREFIX,
        **(sizes | one_process | form | options),
    )
    return runner.routed_experts


@pytest.mark.parametrize("rank", [None, 0, 1])
def test_answers_as_loops_do(rank: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, or on each of two."""
    monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank or 0)
    with gateless_experts_accepted():
        experts = layer(tp_size=1 if rank is None else 2)
    found = modules()
    fill(experts, stored(found, PREFIX))
    half = INTERMEDIATE // 2
    part = slice(None) if rank is None else slice(rank * half, rank * half + half)
    x, weights, ids = chosen(5)
    expected = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, row in enumerate(x.bfloat16().double()):
        for weight, expert in zip(weights[token].double(), ids[token], strict=True):
            up, down = (found[names[expert]].dense.double() for names in (UP, DOWN))
            expected[token] += weight * (down[:, part] @ ((up[part] @ row).relu() ** 2))
    assert relative(answer(experts, x.bfloat16(), weights, ids), expected) < 1e-2


def test_vllm_refuses_them_again_afterwards() -> None:
    check = FusedMoEConfig.__post_init__
    with pytest.raises(KeyError), gateless_experts_accepted():
        raise KeyError
    assert FusedMoEConfig.__post_init__ is check
    with pytest.raises(NotImplementedError, match="supported only for CUDA"):
        layer()


def test_what_vllm_refuses_of_others_stays_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(config: Any) -> None:
        raise NotImplementedError("something else")

    monkeypatch.setattr(FusedMoEConfig, "__post_init__", refuse)
    names = ("gate_proj", "down_proj", "up_proj")
    with (
        gateless_experts_accepted(),
        pytest.raises(NotImplementedError, match="something else"),
    ):
        layer(activation="silu", ckpt_names=names)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dense_ones_are_refused_where_vllm_has_no_kernel(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = SimpleNamespace(is_act_and_mul=False, device=torch.device(device))
    monkeypatch.setattr(
        "permllm_vllm.quantization.gateless_experts.UnquantizedFusedMoEMethod", lambda moe: moe
    )
    if device == "cuda":
        assert dense_experts_method(described, PREFIX, "") is described
        return
    with pytest.raises(NotImplementedError, match=r"have no gate, .* here nobody knows\.$"):
        dense_experts_method(described, PREFIX, "nobody knows")


def test_values_that_no_kernel_takes_are_refused() -> None:
    with gateless_experts_accepted():
        experts = layer(torch.float32)
    message = r"vLLM multiplies such experts dense on GPUs alone; here .* load it in bfloat16"
    with pytest.raises(NotImplementedError, match=message):
        fill(experts, stored(modules(torch.float32), PREFIX))
