"""Products of 8 bits and scales, against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from permllm_vllm.checkpoint.scaled import Block, dequantize
from tests.checkpoint.plain_scaled import decode_e4m3, quantized, restored

DTYPES = [torch.float8_e4m3fn, torch.int8]
SIZES = st.integers(1, 9)
BLOCKS = st.builds(Block, st.none() | SIZES, st.none() | SIZES)


def codes(rows: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bytes but those of NaN, which no product is compared for."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 256, (rows, columns), dtype=torch.uint8, generator=generator)
    if dtype == torch.int8:
        return found.view(dtype)
    return torch.where(found & 0x7F == 0x7F, 0, found).view(dtype)


def scales(grid: tuple[int, int], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(grid, generator=generator) * 0.1


def test_every_byte_of_float8_is_decoded() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, 256)
    found = dequantize(weight, torch.ones(1, 1), Block(None, None), torch.float32)[0]
    for byte, number in enumerate(found.tolist()):
        expected = decode_e4m3(byte)
        assert number == expected or (math.isnan(number) and math.isnan(expected)), byte
        assert math.copysign(1, number) == math.copysign(1, expected) or math.isnan(expected)


def test_every_byte_of_int8_is_decoded() -> None:
    weight = torch.arange(256, dtype=torch.uint8).view(torch.int8).view(1, 256)
    found = dequantize(weight, torch.ones(1, 1), Block(None, None), torch.float32)[0].tolist()
    assert found == [float(byte if byte < 128 else byte - 256) for byte in range(256)]
    assert {-1, 127, -128} <= set(codes(64, 64, torch.int8, 0).flatten().tolist())


def test_of_the_scales_only_those_of_the_rows_are_converted() -> None:
    """Else a part of a tall matrix would cost as much as the whole."""
    scale = scales((1000, 4), 0).bfloat16()
    converted: list[int] = []

    class Counted(torch.Tensor):
        def float(self, *_: object, **__: object) -> Tensor:  # type: ignore[override]
            converted.append(self.numel())
            return self.as_subclass(torch.Tensor).float()

    weight = codes(2, 8, torch.float8_e4m3fn, 0)
    found = dequantize(weight, scale.as_subclass(Counted), Block(1, 2), torch.float32, 500)
    assert converted == [8]
    assert torch.equal(found, dequantize(weight, scale[500:502], Block(1, 2), torch.float32))


@settings(deadline=None)
@given(SIZES, SIZES, BLOCKS, st.sampled_from(DTYPES), st.integers(0, 99))
def test_products_are_those_of_plain_loops(
    rows: int, columns: int, block: Block, dtype: torch.dtype, seed: int
) -> None:
    weight = codes(rows, columns, dtype, seed)
    scale = scales(block.grid(rows, columns), seed)
    expected = restored(weight, scale.tolist(), block.rows or rows, block.columns or columns)
    found = dequantize(weight, scale, block)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@settings(deadline=None)
@given(SIZES, SIZES, BLOCKS, st.data())
def test_some_rows_are_those_of_all(
    rows: int, columns: int, block: Block, data: st.DataObject
) -> None:
    first = data.draw(st.integers(0, rows - 1))
    last = data.draw(st.integers(first, rows))
    weight = codes(rows, columns, torch.float8_e4m3fn, rows)
    scale = scales(block.grid(rows, columns), columns)
    whole = dequantize(weight, scale, block, torch.float32)
    part = dequantize(weight[first:last], scale, block, torch.float32, first)
    assert torch.equal(part, whole[first:last])


@given(st.integers(0, 300), st.integers(0, 300), BLOCKS)
def test_blocks_cover_a_matrix_and_no_more(rows: int, columns: int, block: Block) -> None:
    for count, size, extent in zip(block.grid(rows, columns), block, (rows, columns), strict=True):
        if size is None:
            assert count == (1 if extent else 0)
        else:
            assert (count - 1) * size < max(extent, 1)
            assert count * size >= extent


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_product_is_rounded_once(dtype: torch.dtype) -> None:
    """The product lies between two numbers of bfloat16, far from either."""
    weight = torch.tensor([[1.125]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[1.0658]])
    found = dequantize(weight, scale, Block(None, None), dtype)
    assert found.dtype == dtype
    assert found.item() == (1.125 * scale).to(dtype).item()
    assert found.item() != (1.125 * scale).bfloat16().to(dtype).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scales_of_any_dtype(dtype: torch.dtype) -> None:
    weight, scale = codes(4, 6, torch.float8_e4m3fn, 0), scales((2, 2), 0).to(dtype)
    expected = restored(weight, scale.tolist(), 2, 4)
    assert torch.equal(dequantize(weight, scale, Block(2, 4)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_was_quantized_comes_back_nearly(dtype: torch.dtype) -> None:
    """Within half a step of float8, 2^-4 of a number, or of int8, 1/254 of the largest."""
    weight = torch.randn(10, 12, generator=torch.Generator().manual_seed(0))
    stored, scale = quantized(weight, 4, 5, dtype)
    found = dequantize(stored, torch.tensor(scale), Block(4, 5), torch.float32)
    step = weight.abs() / 16 + weight.abs().max() / (2**10 if dtype != torch.int8 else 254)
    assert ((found - weight).abs() <= step * 1.0001).all()
