"""Every CPU path against a float64 product with the dense weight."""

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.cases import GROUPS, LANES, TWELVE_BITS, Case, cases

TOLERANCE = 3e-3  # relative Frobenius error: the rounding of y to bfloat16 alone gives 1.7e-3
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16, 17, 24, 31, 32, 33, 40, 48, 64, 65, 100, 257, 300)
LARGE_TOKENS = (1, 8, 33, 300)  # for the wider shapes, to stay quick


def exact(x, layer):
    """float64 product, with plain matrix multiplication, of the weight with zeros."""
    y = x.double() @ layer.dense.double().t()
    return y if layer.bias is None else y + layer.bias.double()


def run(layer, isa, x):
    packed = CpuBackend(isa).pack(layer.weights)
    return ops.sparse_linear(
        x,
        packed.packed,
        packed.metadata,
        packed.permutation,
        packed.scale,
        None if layer.bias is None else layer.bias.to(x.dtype),
        layer.dense.shape[0],
        str(layer.weights.pattern),
    )


def assert_close(y, reference):
    assert y.dtype == torch.bfloat16
    assert y.is_contiguous()
    assert y.shape == reference.shape
    # A few outputs alone may all round badly: allow the rounding of bfloat16 element by element.
    error = (y.double() - reference).norm() / reference.norm().clamp_min(1e-30)
    limit = TOLERANCE if y.numel() >= 64 else 2**-8
    assert error <= limit, f"relative Frobenius error {error:.2e}"


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_float64(case: Case, isa: str) -> None:
    layer = case.layer()
    for m in LARGE_TOKENS if case.n * case.k > 60_000 else TOKENS:
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).bfloat16()
        assert_close(run(layer, isa, x), exact(x, layer))


@pytest.mark.parametrize("m", [1, 2, 3, 5, 7, 16, 20, 40, 70])
def test_each_output_is_its_own_product(isa: str, m: int) -> None:
    """A small error that hides in a norm over many outputs shows element by element."""
    layer = random_layer(75, 328, bias=True, permuted=False)
    x = torch.randn(m, 328).bfloat16()
    reference = exact(x, layer)
    size = x.double().abs() @ layer.dense.double().abs().t()
    assert (
        (run(layer, isa, x).double() - reference).abs() <= 2**-8 * (reference.abs() + size)
    ).all()


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_packed_bytes(isa: str, pattern: str) -> None:
    """Resident bytes are at most 0.64 of the dense bfloat16 weight, and no weight is left out."""
    packed = CpuBackend(isa).pack(random_layer(512, 1024, pattern).weights)
    parts = (packed.packed, packed.metadata, packed.permutation, packed.scale)
    total = sum(part.nbytes for part in parts if part is not None)
    least = 7 / 16 if isa in TWELVE_BITS else 9 / 16
    if isa in LANES and pattern != "2:4":
        least = 10 / 16
    assert least <= total / (512 * 1024 * 2) <= least + (0.015 if least == 10 / 16 else 0.04)


def test_negative_zero_is_a_value(isa: str) -> None:
    """Kept zeros of either sign occupy their place, whatever follows them."""
    layer = random_layer(16, 128, zeros=True)
    x = torch.eye(128).bfloat16()
    assert torch.equal(run(layer, isa, x).float(), layer.dense.t().float())


def test_every_weight_is_exact(isa: str) -> None:
    """Unit inputs read the weight itself out of the packed blocks, for few and many tokens."""
    for pattern, block_size in (("2:4", 32), ("2:4", 64), ("4:8", 64), ("4:8", 128)):
        layer = random_layer(40, 256, pattern, block_size)
        inputs = torch.eye(256).bfloat16()
        weight = layer.dense.t()
        assert torch.equal(run(layer, isa, inputs), weight)
        for i in range(0, 256, 51):
            assert torch.equal(run(layer, isa, inputs[i : i + 1]), weight[i : i + 1])


def test_non_contiguous_inputs(isa: str) -> None:
    layer = random_layer(24, 192, bias=True)
    for m in (1, 3, 20):
        wide = torch.randn(m, 3 * 192).bfloat16()
        for x in (wide[:, 192:384], wide[:, 1::3], wide[:, :192].t().contiguous().t()):
            assert_close(run(layer, isa, x), exact(x, layer))
    row = torch.randn(1, 192).bfloat16().expand(18, 192)
    assert_close(run(layer, isa, row), exact(row, layer))


def test_unaligned_inputs(isa: str) -> None:
    layer = random_layer(24, 192)
    storage = torch.randn(1 + 18 * 192).bfloat16()
    x = storage[1:].view(18, 192)
    assert_close(run(layer, isa, x), exact(x, layer))


def test_any_leading_dimensions(isa: str) -> None:
    layer = random_layer(20, 64)
    x = torch.randn(2, 3, 5, 64).bfloat16()
    assert_close(run(layer, isa, x), exact(x, layer))
    assert_close(run(layer, isa, x.transpose(0, 1)), exact(x.transpose(0, 1), layer))
    vector = torch.randn(64).bfloat16()
    assert_close(run(layer, isa, vector), exact(vector, layer))


def test_no_tokens(isa: str) -> None:
    layer = random_layer(20, 64)
    assert run(layer, isa, torch.empty(0, 64).bfloat16()).shape == (0, 20)
    assert run(layer, isa, torch.empty(3, 0, 64).bfloat16()).shape == (3, 0, 20)


def test_non_finite_inputs_stay_in_their_token(isa: str) -> None:
    """Padding of inputs and of tokens must not meet an infinity."""
    for k in (64, 72):
        layer = random_layer(20, k, permuted=False)
        for m in (2, 18):
            x = torch.randn(m, k).bfloat16()
            expected = run(layer, isa, x)
            x[0] = float("inf")
            y = run(layer, isa, x)
            assert not y[0].isfinite().any()
            assert torch.equal(y[1:], expected[1:])


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_an_infinity_reaches_the_rows_that_keep_it_alone(isa: str, pattern: str) -> None:
    """Where inputs are brought to kept values, pruned ones meet nothing: docs/cpu.md."""
    if isa not in (*GROUPS, *LANES):
        pytest.skip(f"{isa} multiplies zeros too, with few tokens")
    layer = random_layer(40, 256, pattern)
    for m, column in ((1, 3), (2, 3), (4, 8), (12, 70), (33, 199), (64, 250)):
        x = torch.randn(m, 256).bfloat16()
        x[-1, column] = 0
        expected = run(layer, isa, x)
        x[-1, column] = float("inf")
        y = run(layer, isa, x)
        kept = layer.dense[:, column] != 0
        assert 0 < int(kept.sum()) < 40
        assert torch.equal(y[-1].isfinite(), ~kept)
        assert torch.equal(y[-1, ~kept], expected[-1, ~kept])
        assert torch.equal(y[:-1], expected[:-1])


def test_deterministic(isa: str) -> None:
    layer = random_layer(300, 576)
    for m in (1, 20, 70):
        x = torch.randn(m, 576).bfloat16()
        assert torch.equal(run(layer, isa, x), run(layer, isa, x))


def test_threads_do_not_change_the_result(isa: str) -> None:
    """Neither where the caller prepares x alone nor, from 16384 elements on, where threads do."""
    layer = random_layer(72, 2752)
    for m in (1, 6, 12, 20, 70, 270):
        x = torch.randn(m, 2752).bfloat16()
        expected = run(layer, isa, x)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(layer, isa, x), expected)
