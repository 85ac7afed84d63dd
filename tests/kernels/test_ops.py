"""The operator as PyTorch sees it: registrations, shape function, compilation."""

import subprocess
import sys

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends import fallback_reason, select_backend
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.reference import ReferenceBackend

CPU = torch.device("cpu")


def arguments(backend, x, *, bias=True, block_size=64):
    layer = random_layer(24, 128, block_size=block_size, bias=bias)
    packed = backend.pack(layer.weights)
    bias_tensor = None if layer.bias is None else layer.bias.to(x.dtype)
    return (
        x, packed.packed, packed.metadata, packed.permutation, packed.scale, bias_tensor, 24, "2:4",
    )  # fmt: skip


def test_opcheck(isa):
    for x in (torch.randn(3, 128).bfloat16(), torch.randn(2, 3, 128).bfloat16()):
        for bias, block_size in ((True, 64), (False, 128)):
            torch.library.opcheck(
                torch.ops.permllm.sparse_linear.default,
                arguments(CpuBackend(isa), x, bias=bias, block_size=block_size),
            )


def test_opcheck_reference():
    torch.library.opcheck(
        torch.ops.permllm.sparse_linear.default,
        arguments(ReferenceBackend(torch.float32), torch.randn(3, 128)),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(isa, dynamic):
    torch._dynamo.reset()  # graphs of other instruction sets count towards a limit
    weights = arguments(CpuBackend(isa), torch.empty(0, 128).bfloat16())[1:]

    def model(x):
        return torch.relu(ops.sparse_linear(x * 2, *weights)) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for m in (1, 5, 20):
        x = torch.randn(m, 128).bfloat16()
        torch.testing.assert_close(compiled(x), model(x))


def test_fake_gives_shape_and_dtype_only():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(4, 5, 128, dtype=torch.bfloat16)
        packed = torch.empty(1000, dtype=torch.uint8)
        y = ops.sparse_linear(x, packed, None, None, None, None, 77, "2:4")
    assert y.shape == (4, 5, 77)
    assert y.dtype == torch.bfloat16


def test_the_permutation_is_traced_without_a_gpu():
    from torch.fx.experimental.proxy_tensor import make_fx

    def model(x, places):
        return torch.ops.permllm.permute_inputs(x.transpose(0, 1), places)

    inputs = torch.empty(6, 2, 128, dtype=torch.float16), torch.empty(128, dtype=torch.uint8)
    graph = make_fx(model, tracing_mode="symbolic")(*inputs).graph
    (call,) = graph.find_nodes(op="call_function", target=torch.ops.permllm.permute_inputs.default)
    y = call.meta["val"]
    assert tuple(map(int, y.shape)) == (2, 6, 128)
    assert y.dtype == torch.float16
    assert y.is_contiguous()  # whatever the strides of x are


def test_reference_backend_is_exact():
    for pattern, block_size in (("2:4", 32), ("4:8", 64), ("2:4", 128)):
        layer = random_layer(24, 256, pattern, block_size, bias=True)
        packed = ReferenceBackend(torch.float32).pack(layer.weights)
        assert torch.equal(packed.packed, layer.dense.float())
        x = torch.randn(5, 256)
        y = ops.sparse_linear(x, packed.packed, None, None, None, layer.bias.float(), 24, pattern)
        torch.testing.assert_close(y, x @ layer.dense.float().t() + layer.bias.float())


def test_reference_backend_applies_the_scale():
    layer = random_layer(24, 64, permuted=False)
    values = (layer.weights.values.float() * 500).round().clamp(-127, 127).to(torch.int8)
    scale = torch.rand(24) + 0.5
    weights = type(layer.weights)(**{**vars(layer.weights), "values": values, "scale": scale})
    packed = ReferenceBackend(torch.float32).pack(weights).packed
    kept = packed[packed != 0].sort().values
    expected = values.float() * scale[:, None]
    torch.testing.assert_close(kept, expected[expected != 0].sort().values)


def test_selection(caplog):
    backend = select_backend(CPU, torch.bfloat16)
    if ops.missing_reason:
        assert backend.name == "reference"
    else:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for values in (torch.bfloat16, torch.int8):
                assert select_backend(CPU, dtype, values).name == "cpu"
        assert not caplog.records
        assert select_backend(CPU, torch.float16, torch.float16).name == "cpu"
        assert "float16 values of sparse layers are rounded" in caplog.text
    backend = select_backend(CPU, torch.float32, torch.float32)
    assert (backend.name, backend.instruction_set) == ("reference", "pytorch")
    assert "reference backend" in caplog.text
    assert "float32" in fallback_reason(CPU, torch.float32, torch.float32)
    assert "float64" in fallback_reason(CPU, torch.float64)
    assert "cuda" in fallback_reason(torch.device("cuda"), torch.bfloat16)
    assert "multiply no experts" in fallback_reason(
        torch.device("cuda"), torch.bfloat16, experts=True
    )


def test_the_package_imports_alone():
    """Neither vLLM nor pydantic nor transformers is needed for the kernels."""
    code = (
        "import sys\n"
        "for name in ('vllm', 'pydantic', 'transformers'): sys.modules[name] = None\n"
        "import permllm_vllm, permllm_vllm.ops, permllm_vllm.backends\n"
        "print(permllm_vllm.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
