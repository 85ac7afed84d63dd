"""The kernels' own code on an emulated GPU, against float64 products with the dense weight."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.shapes import LLAMA_2_7B, random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.emulated import A100, H100, L4, SMALL
from tests.cuda.layers import PRODUCTS, int8_layer
from tests.cuda.rounding import assert_right

DTYPES = (torch.bfloat16, torch.float16)


def check(emulator, layer, tokens, dtype, *, kernel=0, block_rows=0, gpu=SMALL, seed=0):
    n, k = layer.dense.shape
    packed = CudaBackend(dtype).pack(layer.weights)
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    bias = None if layer.bias is None else layer.bias.to(dtype)
    inputs = x
    if kernel and packed.permutation is not None:  # that kernel takes permuted activations
        inputs = emulator.permute(x, packed.permutation[:k].contiguous(), seed)
    y = emulator.linear(
        inputs, packed, bias, n, kernel=kernel, block_rows=block_rows, gpu=gpu, seed=seed
    )
    dense = layer.dense if layer.weights.scale is not None else layer.dense.to(dtype)
    assert_right(y, x, dense.double(), bias)
    return y


SHAPES = PRODUCTS[:6]  # the small ones


@pytest.mark.parametrize("tokens", [1, 8, 13, 32, 33, 64])
@pytest.mark.parametrize(("n", "k", "block_size", "bias"), SHAPES)
def test_few_tokens(emulator, n, k, block_size, bias, tokens):
    layer = random_layer(
        n, k, block_size=block_size or 64, permuted=block_size > 0, bias=bias, zeros=n > 1
    )
    check(emulator, layer, tokens, DTYPES[tokens % 2], seed=tokens)


@pytest.mark.parametrize("tokens", [65, 100, 128, 129, 200, 256])
@pytest.mark.parametrize(("n", "k", "block_size"), [(128, 128, 64), (136, 576, 0), (200, 1152, 32)])
def test_few_tokens_of_several_blocks(emulator, n, k, block_size, tokens):
    """More tokens than those of a block, the last of which may have one; with splits and without.

    Each block permutes its own, and their partial sums lie behind each other.
    """
    layer = random_layer(n, k, block_size=block_size or 64, permuted=block_size > 0, bias=True)
    gpu = H100 if tokens % 2 else SMALL
    splits = emulator.plan(n, k, tokens, int8=False, gpu=gpu, permuted=block_size > 0).splits
    assert (splits > 1) == (k == 1152 and gpu is H100)
    check(emulator, layer, tokens, DTYPES[tokens % 2], gpu=gpu, seed=tokens)


@pytest.mark.parametrize("block_rows", [0, 192, 256])
def test_few_tokens_of_several_blocks_int8(emulator, block_rows):
    layer = int8_layer(329, 704, bias=True)
    check(emulator, layer, 150, torch.bfloat16, block_rows=block_rows)


WIDE = (192, 256)


@pytest.mark.parametrize("block_rows", WIDE)
@pytest.mark.parametrize(
    ("n", "k", "tokens"),
    [(1, 8, 33), (128, 128, 64), (200, 640, 47), (384, 1152, 64), (700, 2112, 50), (200, 640, 131)],
)
def test_few_tokens_in_wide_blocks(emulator, n, k, tokens, block_rows):
    """The last block is whole, or has 64 or 128 rows; with splits and without."""
    layer = random_layer(n, k, permuted=k % 64 == 0, bias=n > 1, zeros=n > 1)
    check(emulator, layer, tokens, DTYPES[n % 2], block_rows=block_rows, seed=tokens)


@pytest.mark.parametrize("block_rows", WIDE)
def test_few_tokens_in_wide_blocks_int8(emulator, block_rows):
    check(emulator, int8_layer(329, 704, bias=True), 50, torch.bfloat16, block_rows=block_rows)


@settings(max_examples=25)
@given(
    n=st.integers(1, 300),
    k=st.integers(1, 130).map(lambda eighths: eighths * 8),
    tokens=st.integers(1, 100),
    block_size=st.sampled_from([32, 64, 128]),
    gpu=st.sampled_from([A100, H100, L4, SMALL]),
    dtype=st.sampled_from(DTYPES),
    block_rows=st.sampled_from([0, *WIDE]),
)
def test_few_tokens_of_any_shape(emulator, n, k, tokens, block_size, gpu, dtype, block_rows):
    layer = random_layer(n, k, block_size=block_size, permuted=k % block_size == 0, bias=True)
    if tokens <= 32 or gpu is L4:  # where no blocks are wide
        block_rows = 0
    check(emulator, layer, tokens, dtype, gpu=gpu, block_rows=block_rows, seed=n + k)


@pytest.mark.parametrize("kernel", [0, 64])
def test_rows_of_a_wider_tensor(emulator, kernel):
    layer = random_layer(40, 192, permuted=False)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    wide = torch.randn(6, 3 * 192).bfloat16()
    x = wide[:, 192:384]
    y = emulator.linear(x, packed, None, 40, kernel=kernel)
    assert torch.equal(y, emulator.linear(x.contiguous(), packed, None, 40, kernel=kernel))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [3, 16, 50])
def test_few_tokens_int8(emulator, tokens, dtype):
    check(emulator, int8_layer(75, 704, bias=True), tokens, dtype)


@pytest.mark.parametrize("gpu", [A100, H100, L4, SMALL], ids=["a100", "h100", "l4", "small"])
def test_few_tokens_with_the_plan_of_each_gpu(emulator, gpu):
    layer = random_layer(200, 2112, bias=True)
    splits = emulator.plan(200, 2112, 20, int8=False, gpu=gpu).splits
    assert splits > 1
    check(emulator, layer, 20, torch.bfloat16, gpu=gpu)


@pytest.mark.parametrize("kernel", [64, 128])
@pytest.mark.parametrize(("n", "k", "block_size", "bias"), SHAPES[2:])
def test_many_tokens(emulator, n, k, block_size, bias, kernel):
    layer = random_layer(
        n, k, block_size=block_size or 64, permuted=block_size > 0, bias=bias, zeros=n > 1
    )
    check(emulator, layer, kernel + 2, DTYPES[n % 2], kernel=kernel)


@pytest.mark.parametrize("kernel", [64, 128])
def test_many_tokens_int8(emulator, kernel):
    check(emulator, int8_layer(75, 704, bias=True), 70, torch.bfloat16, kernel=kernel)


def test_the_order_of_threads_does_not_matter(emulator):
    """Each seed runs the threads in other orders: bytes must not change, splits included."""
    layer = random_layer(64, 1152, bias=True)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    for kernel, block_rows, tokens in ((0, 0, 9), (64, 0, 9), (0, 192, 40)):
        x = torch.randn(tokens, 1152).bfloat16()
        first, *others = (
            emulator.linear(
                x, packed, layer.bias, 64, kernel=kernel, block_rows=block_rows, seed=seed * 1000
            )
            for seed in range(5)
        )
        assert all(torch.equal(first, other) for other in others)


def test_a_token_does_not_depend_on_its_neighbours(emulator):
    layer = random_layer(40, 256)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
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


@pytest.mark.parametrize(
    ("dtype", "columns"),
    [(torch.uint8, 64), (torch.uint8, 4224), (torch.bfloat16, 200), (torch.bfloat16, 4096),
     (torch.float32, 96), (torch.float32, 1280)],
)  # fmt: skip
@pytest.mark.parametrize("tokens", [1, 4, 7])
def test_permute(emulator, dtype, columns, tokens):
    x = torch.randint(0, 255, (tokens, columns)).to(dtype)
    sizes = [min(128, columns - start) for start in range(0, columns, 128)]
    places = torch.cat([torch.randperm(size) for size in sizes])
    absolute = places + torch.arange(columns) // 128 * 128
    y = emulator.permute(x, places.to(torch.uint8))
    assert torch.equal(y, x[:, absolute])


@pytest.mark.parametrize("gpu", [A100, H100, L4, SMALL], ids=["a100", "h100", "l4", "small"])
@pytest.mark.parametrize("int8", [False, True])
def test_plans_fit(emulator, gpu, int8):
    shapes = [*LLAMA_2_7B, (1, 8), (128, 128), (1000, 1000), (128256, 4096), (4096, 28672)]
    for rows, inputs in shapes:
        steps = -(-inputs // 128)
        for tokens, permuted in product((1, 8, 9, 16, 17, 33, 64, 65, 256), (False, True)):
            plan = emulator.plan(rows, inputs, tokens, int8=int8, gpu=gpu, permuted=permuted)
            assert plan.rows == 128 or tokens > 32
            assert plan.token_tiles * 8 >= min(tokens, 64)
            assert plan.shared_bytes <= gpu.per_block
            assert (plan.splits - 1) * plan.steps_per_split < steps
            assert plan.splits * plan.steps_per_split >= steps


def test_plans_fill_the_gpu(emulator):
    """A narrow layer is split over its inputs, a wide one is not."""
    assert emulator.plan(4096, 4096, 1, int8=False, gpu=H100).splits >= 4
    assert emulator.plan(128256, 4096, 1, int8=False, gpu=H100).splits == 1
