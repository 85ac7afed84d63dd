"""A sparse layer inside `torch.compile`: one graph for all numbers of tokens, and nothing else."""

from collections.abc import Callable

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend, EagerAndRecordGraphs
from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear

from permllm_vllm.backends.cpu import instruction_sets
from tests.quantization.sparse_modules import config, load, permutation, sparse_module

CHANNELS, ROWS = 128, 48
OnRank = Callable[[int, int], None]
SKIP_WITHOUT_KERNELS = pytest.mark.skipif(
    not instruction_sets(), reason="the CPU kernels were not built"
)


@pytest.fixture(
    params=[torch.float32, pytest.param(torch.bfloat16, marks=SKIP_WITHOUT_KERNELS)], ids=str
)
def layer(request: pytest.FixtureRequest, on_rank: OnRank) -> LinearBase:
    torch._dynamo.reset()
    made = MergedColumnParallelLinear(
        CHANNELS,
        [ROWS, ROWS],
        bias=False,
        params_dtype=request.param,
        quant_config=config(["gate", "up"]),
        prefix="gate_up_proj",
    )
    for shard in (0, 1):
        load(made, sparse_module(ROWS, CHANNELS, local=permutation(CHANNELS)), shard)
    made.quant_method.process_weights_after_loading(made)
    return made


def activations(layer: LinearBase, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(tokens, CHANNELS, generator=generator).to(layer.params_dtype)


def multiply(layer: LinearBase) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: layer.quant_method.apply(layer, x)


def test_no_graph_break(layer: LinearBase) -> None:
    explanation = torch._dynamo.explain(multiply(layer))(activations(layer, 4))
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0


def test_one_compilation_serves_every_number_of_tokens(layer: LinearBase) -> None:
    """The kernels for few and for many tokens are chosen inside the operator."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(multiply(layer), fullgraph=True, backend=counter)
    for tokens in (5, 2, 8, 33, 64, 257):
        x = activations(layer, tokens)
        torch._dynamo.mark_dynamic(x, 0)  # as vLLM does
        torch.testing.assert_close(compiled(x), multiply(layer)(x), rtol=0, atol=0)
    assert counter.frame_count == 1


def test_one_node_computes(layer: LinearBase) -> None:
    """No gather, cast or copy around the operator."""
    recorder = EagerAndRecordGraphs()
    torch.compile(multiply(layer), fullgraph=True, backend=recorder)(activations(layer, 4))
    (graph,) = recorder.graphs
    calls = [node.target for node in graph.graph.nodes if node.op.startswith("call")]
    assert calls == [torch.ops.permllm.sparse_linear.default]


def test_inductor(layer: LinearBase) -> None:
    compiled = torch.compile(multiply(layer), fullgraph=True)
    x = activations(layer, 7)
    torch.testing.assert_close(compiled(x), multiply(layer)(x), rtol=0, atol=0)


def test_output_and_inputs_are_apart(layer: LinearBase) -> None:
    """A captured graph replays on fixed memory: the operator changes none of its inputs."""
    x = activations(layer, 4)
    before = [t.clone() for t in (x, *layer.parameters())]
    output = multiply(layer)(x)
    for tensor, copy in zip((x, *layer.parameters()), before, strict=True):
        assert torch.equal(tensor, copy)
        assert output.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_shapes_need_no_data(layer: LinearBase) -> None:
    """Tracing sees sizes alone, so nothing on the host can depend on values."""
    x = activations(layer, 4).to("meta")
    with torch.device("meta"):
        parameters = [
            p.to("meta") for p in (layer.weight_packed, layer.weight_metadata) if p is not None
        ]
    packed, *rest = parameters
    output = torch.ops.permllm.sparse_linear(
        x, packed, rest[0] if rest else None, None, None, None, 2 * ROWS, "2:4"
    )
    assert output.shape == (4, 2 * ROWS)
    assert output.dtype == layer.params_dtype
