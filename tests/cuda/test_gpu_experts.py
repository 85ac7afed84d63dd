"""Experts on a GPU, against float64 products with their dense weights.

Inputs differ from run to run, and a failure prints its seed; memory is full of NaN.
"""

import pytest
import torch

from permllm_vllm.backends.cuda import unsupported_reason
from tests.cuda.experts_on_gpu import TOLERANCE, Experts, routed
from tests.cuda.layers import int8_layer
from tests.cuda.on_gpu import CUDA

REASON = unsupported_reason(CUDA, torch.bfloat16)
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU and the CUDA kernels: {REASON}")

SHAPES = ((1, 1, 128, 64), (8, 2, 192, 72), (40, 4, 1024, 512), (64, 8, 2048, 1024))
"""Experts, choices, hidden and inner sizes."""
TOKENS = (1, 3, 16, 24, 60, 100, 300, 700, 3000)
"""With 40 experts, 4 for each token, blocks hold 8, 16, 32, 64 and 128 pairs."""


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("experts", "choices", "hidden", "inner"), SHAPES)
def test_matches_float64(experts, choices, hidden, inner, dtype, seed):
    layer = Experts(experts, hidden, inner, dtype, seed=seed)
    for tokens in TOKENS:
        x = torch.randn(tokens, hidden, device=CUDA).to(dtype)
        layer.check(x, *routed(tokens, choices, experts))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_int8(dtype, seed):
    """Blocks of every size, too."""
    layer = Experts(6, 256, 128, dtype, make=int8_layer, seed=seed)
    for tokens in (*TOKENS, 8):
        x = torch.randn(tokens, 256, device=CUDA) / 4  # results of float16 stay finite
        layer.check(x.to(dtype), *routed(tokens, 3, 6))


@pytest.mark.parametrize("tokens", [5, 900])
def test_all_tokens_to_one_expert(tokens, seed):
    layer = Experts(7, 256, 128, seed=seed)
    ids = torch.full((tokens, 1), 5, dtype=torch.int32, device=CUDA)
    x = torch.randn(tokens, 256, device=CUDA).bfloat16()
    layer.check(x, torch.rand(tokens, 1, device=CUDA), ids)


def test_experts_elsewhere_add_nothing(seed):
    layer = Experts(4, 128, 64, seed=seed)
    weights, ids = routed(200, 2, 4)
    ids[::3] = -1
    ids[1::3, 0] = 4
    x = torch.randn(200, 128, device=CUDA).bfloat16()
    layer.check(x, weights, ids)
    assert not layer(x, weights, ids)[::3].any()


def test_strided_inputs(seed):
    layer = Experts(4, 128, 64, seed=seed)
    wide = torch.randn(30, 3 * 128 + 1, device=CUDA).bfloat16()
    for x in (wide[:, 128:256], wide[:, :384:3], wide[:, 1:129]):
        layer.check(x, *routed(30, 2, 4))
    assert layer(wide[:0, :128], *routed(0, 2, 4)).shape == (0, 128)


@pytest.mark.parametrize("tokens", [1, 40, 1500])
def test_deterministic(tokens, seed):
    """Which pair of an expert comes first differs."""
    layer = Experts(16, 512, 256, seed=seed)
    x, routes = torch.randn(tokens, 512, device=CUDA).bfloat16(), routed(tokens, 4, 16)
    first = layer(x, *routes)
    for _ in range(10):
        assert torch.equal(layer(x, *routes), first)


@pytest.mark.parametrize("tokens", [1, 16, 1000])
def test_replays_in_a_graph(tokens, seed):
    """Tokens go elsewhere in each replay."""
    layer = Experts(16, 512, 256, seed=seed)
    x, (weights, ids) = torch.randn(tokens, 512, device=CUDA).bfloat16(), routed(tokens, 4, 16)
    layer(x, weights, ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, weights, ids)
    for _ in range(5):
        x.copy_(torch.randn(tokens, 512, device=CUDA))
        for target, source in zip((weights, ids), routed(tokens, 4, 16), strict=True):
            target.copy_(source)
        graph.replay()
        assert torch.equal(y, layer(x, weights, ids))


def test_waits_for_the_kernel_before(seed):
    """Each call reads what the call in front of it has just written."""
    layer = Experts(8, 512, 256, seed=seed)
    routes = routed(50, 2, 8)
    start = torch.randn(50, 512, device=CUDA).bfloat16()

    def chain(synchronise):
        x = start
        for _ in range(40):
            x = layer(torch.nn.functional.rms_norm(x, (512,)), *routes)
            if synchronise:
                torch.cuda.synchronize()
        return x

    expected = chain(True)
    for _ in range(10):
        assert torch.equal(chain(False), expected)


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_other_activations(seed, activation):
    layer = Experts(3, 128, 64, seed=seed, activation=activation)
    layer.check(torch.randn(5, 128, device=CUDA).bfloat16(), *routed(5, 2, 3))


def test_opcheck(seed):
    layer = Experts(3, 128, 64, seed=seed)
    x = torch.randn(5, 128, device=CUDA).bfloat16()
    torch.library.opcheck(
        torch.ops.permllm.sparse_experts.default, (x, *routed(5, 2, 3), *layer.operands, 64)
    )


def test_refuses_what_does_not_fit():
    layer = Experts(3, 128, 64)
    weights, ids = routed(5, 2, 3)
    good = [torch.randn(5, 128, device=CUDA).bfloat16(), weights, ids, *layer.operands, 64, 0]
    torch.ops.permllm.sparse_experts(*good)
    x, gate_up, metadata, down = 0, 3, 4, 7
    for place, value, message in (
        (x, good[x].float(), "neither bfloat16 nor float16"),
        (x, good[x][None], r"must be \[tokens, in\]"),
        (x, good[x].repeat(1, 2), "gate_up of shape .* 256 inputs"),
        (1, weights.double(), "topk_weights of shape"),
        (1, weights[:, :1].contiguous(), "must have the same shape"),
        (2, ids.long(), "topk_ids of shape"),
        (2, ids.cpu(), "topk_ids of shape"),
        (gate_up, good[gate_up][:2].contiguous(), "gate_up_metadata of shape"),
        (gate_up, good[gate_up][:, :64].contiguous(), "gate_up of shape"),
        (metadata, good[metadata].cpu(), "gate_up_metadata of shape"),
        (down, good[down].half(), "down of shape"),
        (6, torch.ones(3, 128, device=CUDA), "gate_up_scale is there"),
        (11, 256, r"gate_up of shape .* for 512 outputs"),
        (11, 60, "intermediate_size is 60"),
        (12, 2, "gate_up of shape .* for 64 outputs"),
        (12, 3, "activation is 3: 0 is silu, 1 is gelu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.permllm.sparse_experts(*good[:place], value, *good[place + 1 :])
