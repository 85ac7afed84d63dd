"""The kernels on a GPU, against float64 products with the dense weight.

Inputs differ from run to run, and a failure prints its seed. Where results are compared with
float64, all memory that the operator is given, for its result and between, is full of NaN.
"""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends import select_backend
from permllm_vllm.backends.cuda import CudaBackend, unsupported_reason
from tests.cuda.layers import PRODUCTS, TOKENS, WIDE, assert_right, int8_layer, replace

CUDA = torch.device("cuda")
REASON = unsupported_reason(CUDA, torch.bfloat16)  # kernels that are wrong fail, and skip nothing
pytestmark = pytest.mark.skipif(bool(REASON), reason=f"needs a GPU and the CUDA kernels: {REASON}")

DTYPES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def poisoned_memory():
    """PyTorch fills what it allocates with NaN, by kernels of its own in front of ours."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class OnGpu:
    """A layer on the GPU: packed, and dense in float64."""

    def __init__(self, layer, dtype):
        weights = layer.weights
        tensors = {
            name: value.to(CUDA) for name, value in vars(weights).items() if torch.is_tensor(value)
        }
        self.packed = CudaBackend(dtype).pack(replace(weights, **tensors))
        dense = layer.dense if weights.scale is not None else layer.dense.to(dtype)
        self.dense = dense.double().to(CUDA)
        self.bias = None if layer.bias is None else layer.bias.to(CUDA, dtype)

    def __call__(self, x):
        rows = self.dense.shape[0]
        packed = self.packed
        return ops.sparse_linear(
            x, packed.packed, packed.metadata, packed.permutation, packed.scale, self.bias, rows,
            "2:4",
        )  # fmt: skip

    def check(self, x):
        with poisoned_memory():
            y = self(x)
        self.compare(x, y)

    def compare(self, x, y):
        assert_right(y, x, self.dense, self.bias)


def test_memory_is_poisoned():
    with poisoned_memory():
        assert torch.empty(1000, device=CUDA, dtype=torch.bfloat16).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k", "block_size", "bias"), PRODUCTS)
def test_matches_float64(n, k, block_size, bias, dtype, seed):
    layer = OnGpu(
        random_layer(
            n, k, block_size=block_size or 64, permuted=block_size > 0, bias=bias, zeros=n > 1,
            seed=seed,
        ),
        dtype,
    )  # fmt: skip
    for tokens in TOKENS:
        layer.check(torch.randn(tokens, k, device=CUDA).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(75, 704), (512, 4096), (WIDE, 256)])
def test_int8(n, k, dtype, seed):
    layer = OnGpu(int8_layer(n, k, bias=True, seed=seed), dtype)
    for tokens in TOKENS:
        layer.check(torch.randn(tokens, k, device=CUDA).to(dtype))


def require_memory(needed):
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory of the GPU, which has {free >> 30}")


@pytest.mark.parametrize("rows", [1 << 16, (1 << 16) - 4])  # the latter none of CUTLASS
def test_more_results_than_32_bits_count(rows, seed):
    """y has more than 2^31 elements: the tokens around that one, and the last, are compared."""
    border = 2**31 // rows
    tokens = border + 70
    require_memory(3 * 2 * rows * tokens)
    layer = OnGpu(random_layer(rows, 128, seed=seed), torch.bfloat16)
    x = torch.randn(tokens, 128, device=CUDA).bfloat16()
    with poisoned_memory():
        y = layer(x)
    assert y.numel() > 2**31
    for first in (0, border - 3, tokens - 5):
        layer.compare(x[first : first + 5], y[first : first + 5])
    for part in y.split(1 << 12):
        assert part.isfinite().all()


def permutation_of(columns):
    """Places inside blocks of 128, and where they are in a row."""
    sizes = [min(128, columns - start) for start in range(0, columns, 128)]
    places = torch.cat([torch.randperm(size) for size in sizes]).to(CUDA)
    return places.to(torch.uint8), places + torch.arange(columns, device=CUDA) // 128 * 128


def test_permutes_more_elements_than_32_bits_count(seed):
    columns, tokens = 1 << 16, (1 << 15) + 7
    require_memory(3 * 2 * columns * tokens)
    places, absolute = permutation_of(columns)
    x = torch.randn(tokens, columns, device=CUDA, dtype=torch.bfloat16)
    y = torch.ops.permllm.permute_inputs(x, places)
    for some in (slice(0, 4), slice(tokens - 10, tokens)):
        assert torch.equal(y[some], x[some][:, absolute])


@pytest.mark.parametrize("tokens", [1, 64, 200])
def test_every_weight_is_exact(tokens):
    layer = OnGpu(random_layer(200, 256, zeros=True), torch.bfloat16)
    x = torch.eye(256, dtype=torch.bfloat16, device=CUDA)
    y = torch.cat([layer(part) for part in x.split(tokens)])
    assert torch.equal(y.double(), layer.dense.t())


def test_strided_and_shaped_inputs(seed):
    layer = OnGpu(random_layer(96, 192, bias=True), torch.bfloat16)
    for tokens in (3, 100):
        wide = torch.randn(tokens, 3 * 192 + 1, device=CUDA).bfloat16()
        for x in (wide[:, 192:384], wide[:, :576:3], wide[:, 1:193]):
            layer.check(x)
        even = torch.randn(tokens, 3 * 192, device=CUDA).bfloat16()
        layer.check(even[:, 192:384])
        layer.check(even[:1, :192].expand(tokens, 192))
        layer.check(even.flatten()[: 8 * tokens + 184].unfold(0, 192, 8))  # rows that overlap
    x = torch.randn(2, 3, 5, 192, device=CUDA).bfloat16()
    layer.check(x)
    layer.check(x.transpose(0, 1))
    layer.check(x[0, 0, 0])
    assert layer(x[:0]).shape == (0, 3, 5, 96)


@pytest.mark.parametrize("tokens", [1, 40, 129, 300])  # the third is split, with partial sums
def test_deterministic(tokens, seed):
    layer = OnGpu(random_layer(256, 4096), torch.bfloat16)
    x = torch.randn(tokens, 4096, device=CUDA).bfloat16()
    first = layer(x)
    for _ in range(10):
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("tokens", [5, 150])
def test_non_finite_inputs_stay_in_their_token(tokens, seed):
    layer = OnGpu(random_layer(96, 72, permuted=False), torch.bfloat16)
    x = torch.randn(tokens, 72, device=CUDA).bfloat16()
    expected = layer(x)
    x[0] = float("inf")
    y = layer(x)
    assert not y[0].isfinite().any()
    assert torch.equal(y[1:], expected[1:])


@pytest.mark.parametrize("tokens", [1, 16, 64, 128, 1000])
def test_replays_in_a_graph(tokens, seed):
    first = OnGpu(random_layer(WIDE, 1024, seed=seed), torch.bfloat16)
    second = OnGpu(random_layer(256, WIDE, bias=True, seed=seed), torch.bfloat16)
    x = torch.randn(tokens, 1024, device=CUDA).bfloat16()
    second(first(x))
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = second(first(x))
    for _ in range(5):
        x.copy_(torch.randn(tokens, 1024, device=CUDA))
        graph.replay()
        assert torch.equal(y, second(first(x)))


@pytest.mark.parametrize("rows", [1024, WIDE])
@pytest.mark.parametrize("tokens", [1, 33, 200, 300])
def test_waits_for_the_kernel_before(tokens, rows, seed):
    """Each call reads what the kernel in front of it has just written, and nothing older."""
    up = OnGpu(random_layer(rows, 1024, seed=seed), torch.bfloat16)
    down = OnGpu(random_layer(1024, rows, seed=seed + 1), torch.bfloat16)
    start = torch.randn(tokens, 1024, device=CUDA).bfloat16()

    def chain(synchronise):
        x = start
        for _ in range(40):
            x = up(torch.tanh(x))
            if synchronise:
                torch.cuda.synchronize()
            x = down(x)
            if synchronise:
                torch.cuda.synchronize()
        return x

    expected = chain(True)
    for _ in range(10):
        assert torch.equal(chain(False), expected)


def test_runs_on_the_current_stream(seed):
    layer = OnGpu(random_layer(256, 512), torch.bfloat16)
    x = torch.randn(16, 512, device=CUDA).bfloat16()
    expected = layer(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        late = torch.zeros_like(x).copy_(x)
        y = layer(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


def test_runs_in_a_thread_that_has_no_context_yet(seed):
    """TMA's descriptors are encoded in it; no permutation, whose kernel would bind one before."""
    layer = OnGpu(random_layer(256, 512, permuted=False, seed=seed), torch.bfloat16)
    x = torch.randn(200, 512, device=CUDA).bfloat16()
    expected = layer(x).clone()  # and the memory of y is there for the thread
    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as thread:
        assert torch.equal(thread.submit(layer, x).result(), expected)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, backend, seed):
    if backend == "inductor":
        pytest.importorskip("triton", reason="Inductor needs triton, which is not installed")
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")):
            pytest.skip("triton needs a C compiler: install gcc")
    layer = OnGpu(random_layer(64, 128, bias=True), torch.bfloat16)
    packed = layer.packed

    def model(x):
        y = ops.sparse_linear(
            x * 2, packed.packed, packed.metadata, packed.permutation, packed.scale, layer.bias, 64,
            "2:4",
        )  # fmt: skip
        return torch.relu(y) + 1

    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend=backend)
    for tokens in (1, 5, 100):
        x = torch.randn(tokens, 128, device=CUDA).bfloat16()
        # Inductor keeps float32 between what it fuses, and rounds once.
        torch.testing.assert_close(compiled(x), model(x), rtol=2**-6, atol=2**-6)


def test_opcheck():
    layer = OnGpu(random_layer(24, 128, bias=True), torch.bfloat16)
    packed = layer.packed
    x = torch.randn(2, 3, 128, device=CUDA).bfloat16()
    torch.library.opcheck(
        torch.ops.permllm.sparse_linear.default,
        (
            x, packed.packed, packed.metadata, packed.permutation, packed.scale, layer.bias, 24,
            "2:4",
        ),
    )  # fmt: skip


@pytest.mark.parametrize("columns", [8, 208, 4096, 11008])
def test_permute_inputs(columns, seed):
    places, absolute = permutation_of(columns)
    for tokens in (1, 5, 333):
        x = torch.randn(tokens, columns, device=CUDA).half()
        assert torch.equal(torch.ops.permllm.permute_inputs(x, places), x[:, absolute])


def test_opcheck_permute_inputs():
    places, _ = permutation_of(128)
    x = torch.randn(2, 3, 128, device=CUDA).bfloat16()
    for inputs in (x, x.transpose(0, 1)):
        torch.library.opcheck(torch.ops.permllm.permute_inputs.default, (inputs, places))
    with pytest.raises(RuntimeError, match="4 bytes per element"):
        torch.ops.permllm.permute_inputs(x.float(), places)


def test_selection():
    backend = select_backend(CUDA, torch.bfloat16)
    assert backend.name == "cuda"
    assert select_backend(CUDA, torch.float32).name == "reference"
    assert select_backend(CUDA, torch.bfloat16, experts=True).name == "reference"


def test_says_that_memory_is_full():
    layer = OnGpu(random_layer(1 << 16, 128), torch.bfloat16)
    x = torch.zeros(1, 128, device=CUDA).bfloat16()
    with pytest.raises(RuntimeError, match=f"CUDA out of memory: the result .* {1 << 39} bytes"):
        layer(x.expand(1 << 22, 128))
    assert layer(x).isfinite().all()


def test_refuses_what_does_not_fit():
    layer = OnGpu(random_layer(64, 128), torch.bfloat16)
    packed = layer.packed
    good = {
        "x": torch.randn(2, 128, device=CUDA).bfloat16(),
        "packed": packed.packed,
        "metadata": packed.metadata,
        "permutation": packed.permutation,
        "scale": None,
        "bias": None,
        "out_features": 64,
        "pattern": "2:4",
    }
    ops.sparse_linear(**good)
    for changes, message in (
        ({"x": good["x"].float()}, "neither bfloat16 nor float16"),
        ({"x": good["x"].half()}, "packed of shape"),
        ({"x": good["x"][:, :100]}, "multiple of 8"),
        ({"x": torch.zeros(2, 256, device=CUDA).bfloat16()}, "does not fit packed"),
        ({"metadata": packed.metadata.cpu()}, "metadata of shape"),
        ({"metadata": packed.metadata[:, :1].contiguous()}, "metadata of shape"),
        ({"permutation": packed.permutation.int()}, "permutation of shape"),
        ({"scale": torch.ones(64, device=CUDA)}, "scale is there"),
        ({"bias": torch.ones(64, device=CUDA)}, "bias of shape"),
        ({"out_features": 200}, "out_features is 200"),
        ({"pattern": "4:8"}, "has no CUDA kernel"),
        # More rows than a launch has blocks for; refused before anything is read.
        (
            {"packed": packed.packed[:1, :1].expand(65536 * 128, 64), "out_features": 65536 * 128},
            "more than 8388480 outputs",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sparse_linear(**{**good, **changes})
