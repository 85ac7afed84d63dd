"""The kernels' own code on an emulated GPU, against float64 products with the dense weight."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shapes import LLAMA_2_7B, random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.emulated import A100, H100, L4, SMALL
from tests.cuda.layers import PRODUCTS, assert_right, int8_layer

DTYPES = (torch.bfloat16, torch.float16)
GPUS = pytest.mark.parametrize("gpu", [A100, H100, L4, SMALL], ids=["a100", "h100", "l4", "small"])


def check(emulator, layer, tokens, dtype, *, gpu=SMALL, seed=0):
    n, k = layer.dense.shape
    packed = CudaBackend(dtype).pack(layer.weights)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    y = emulator.linear(x, packed, bias, n, gpu=gpu, seed=seed)
    dense = layer.dense if layer.weights.scale is not None else layer.dense.to(dtype)
    assert_right(y, x, dense.double(), bias)


@pytest.mark.parametrize("tokens", [1, 8, 13, 32, 33, 64, 65, 150])
@pytest.mark.parametrize(("n", "k", "block_size", "bias"), PRODUCTS[:6])  # the small ones
def test_products(emulator, n, k, block_size, bias, tokens):
    layer = random_layer(
        n, k, block_size=block_size or 64, permuted=block_size > 0, bias=bias, zeros=n > 1
    )
    check(emulator, layer, tokens, DTYPES[tokens % 2], seed=tokens)


@settings(max_examples=25)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 130).map(lambda eighths: eighths * 8),
    tokens=st.integers(1, 100),
    block_size=st.sampled_from([32, 64, 128]),
    gpu=st.sampled_from([A100, H100, L4, SMALL]),
    dtype=st.sampled_from(DTYPES),
)
def test_products_of_any_shape(emulator, n, k, tokens, block_size, gpu, dtype):
    layer = random_layer(n, k, block_size=block_size, permuted=k % block_size == 0, bias=True)
    check(emulator, layer, tokens, dtype, gpu=gpu, seed=n + k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 16, 50, 70])
def test_int8(emulator, tokens, dtype):
    check(emulator, int8_layer(75, 704, bias=True), tokens, dtype)


@GPUS
@pytest.mark.parametrize("tokens", [20, 129])
def test_splits_of_each_gpu(emulator, gpu, tokens):
    layer = random_layer(200, 2112, bias=True)
    splits = emulator.plan(200, 2112, tokens, int8=False, gpu=gpu).splits
    assert splits > 1 or (gpu is SMALL and tokens == 129)
    check(emulator, layer, tokens, torch.bfloat16, gpu=gpu)


def test_rows_of_a_wider_tensor(emulator):
    packed = CudaBackend(torch.bfloat16).pack(random_layer(40, 192).weights)
    x = torch.randn(6, 3 * 192).bfloat16()[:, 192:384]
    y = emulator.linear(x, packed, None, 40)
    assert torch.equal(y, emulator.linear(x.contiguous(), packed, None, 40))


def test_the_order_of_threads_does_not_matter(emulator):
    """Each seed runs the threads in other orders: bytes must not change, splits included."""
    layer = random_layer(64, 1152, bias=True)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    for tokens in (9, 40):
        x = torch.randn(tokens, 1152).bfloat16()
        first, *others = (
            emulator.linear(x, packed, layer.bias, 64, seed=seed * 1000) for seed in range(5)
        )
        assert all(torch.equal(first, other) for other in others)


def test_a_token_does_not_depend_on_its_neighbours(emulator):
    packed = CudaBackend(torch.bfloat16).pack(random_layer(40, 256).weights)
    x = torch.randn(5, 256).bfloat16()
    y = emulator.linear(x, packed, None, 40)
    x[1:] = float("nan")
    assert torch.equal(emulator.linear(x, packed, None, 40)[0], y[0])


def test_int8_becomes_each_of_its_values(emulator):
    """All 256 values, read out of the weight by unit inputs."""
    for dtype in DTYPES:
        layer = int8_layer(128, 64, permuted=False)
        values = torch.arange(-128, 128).to(torch.int8).repeat(16).view(128, 32)
        weights = type(layer.weights)(
            **{**vars(layer.weights), "values": values, "scale": torch.ones(128)}
        )
        packed = CudaBackend(dtype).pack(weights)
        y = emulator.linear(torch.eye(64, dtype=dtype), packed, None, 128)
        assert torch.equal(y[y != 0].sort().values, values[values != 0].to(dtype).sort().values)


@pytest.mark.parametrize("columns", [8, 64, 200, 2176, 4224])
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_permute(emulator, columns, tokens):
    x = torch.randn(tokens, columns).bfloat16()
    sizes = [min(128, columns - start) for start in range(0, columns, 128)]
    places = torch.cat([torch.randperm(size) for size in sizes])
    absolute = places + torch.arange(columns) // 128 * 128
    y = emulator.permute(x, places.to(torch.uint8))
    assert torch.equal(y, x[:, absolute])


@GPUS
@pytest.mark.parametrize("int8", [False, True])
def test_plans_fit(emulator, gpu, int8):
    shapes = [*LLAMA_2_7B, (1, 8), (128, 128), (1000, 1000), (128256, 4096), (4096, 28672)]
    for (rows, inputs), tokens in product(shapes, (1, 8, 9, 16, 17, 33, 64, 65, 256, 100_000)):
        steps = -(-inputs // 128)
        plan = emulator.plan(rows, inputs, tokens, int8=int8, gpu=gpu)
        assert plan.token_tiles * 8 >= min(tokens, 64)
        assert plan.shared_bytes <= gpu.per_block
        assert (plan.splits - 1) * plan.steps_per_split < steps
        assert plan.splits * plan.steps_per_split >= steps
        assert plan.splits == 1 or tokens <= 65535  # blocks of the kernel that adds them


def test_plans_fill_the_gpu(emulator):
    """A narrow layer is split over its inputs, a wide one is not."""
    assert emulator.plan(4096, 4096, 1, int8=False, gpu=H100).splits >= 4
    assert emulator.plan(128256, 4096, 1, int8=False, gpu=H100).splits == 1


def test_choices(emulator):
    """CUTLASS' GEMM takes 16-bit values of more tokens than a block has, on an H100."""
    layer = (4096, 4096)
    assert emulator.choice(*layer, 64, gpu=H100) == (False, False)
    assert emulator.choice(*layer, 65, gpu=H100) == (True, True)
    assert emulator.choice(*layer, 65, gpu=H100, permuted=False) == (True, False)
    assert emulator.choice(*layer, 65, gpu=H100, int8=True) == (False, True)
    assert emulator.choice(4092, 4096, 65, gpu=H100) == (False, True)
    assert emulator.choice(*layer, 65, gpu=A100) == (False, True)


def test_the_largest_sizes_fit_a_launch(emulator):
    grids = emulator.largest_grids()
    assert max(grids) == 65535
    assert min(grids) >= 1
