"""Activations permuted in shared memory, through the layout that tensor cores read there."""

import ctypes
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16)
Run = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def run(compile_with_cutlass) -> Run:
    library = compile_with_cutlass("permuted_stage.cpp", "-O1")
    library.permute_stages.restype = ctypes.c_char_p

    def permute(x: Tensor, places: Tensor, tile: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """What wgmma reads, `[tile, padded inputs]`, and how often each element was written."""
        y = torch.empty(tile, len(places), dtype=x.dtype)
        writes = torch.empty(y.shape, dtype=torch.int32)
        error = library.permute_stages(
            x.dtype == torch.float16, tile, len(places) // 128, *map(pointer, (x,)), *x.shape,
            *map(pointer, (places, y, writes)), seed,
        )  # fmt: skip
        assert error is None, error
        return y, writes

    return permute


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def random_places(inputs: int, block_size: int) -> Tensor:
    """A permutation within blocks, local to 128 inputs; what follows the last input stays."""
    padded = -(-inputs // 128) * 128
    places = torch.arange(padded)
    for start in range(0, inputs, block_size):
        places[start : start + block_size] = start + torch.randperm(block_size)
    return (places % 128).to(torch.uint8)


def expected(x: Tensor, places: Tensor, tile: int) -> Tensor:
    padded = torch.zeros(tile, len(places), dtype=x.dtype)
    padded[: x.shape[0], : x.shape[1]] = x
    return padded[:, places + torch.arange(len(places)) // 128 * 128]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [32, 64])
@pytest.mark.parametrize(
    ("inputs", "block_size"),
    [(128, 32), (128, 64), (128, 128), (320, 32), (320, 64), (384, 128), (960, 64), (1024, 128)],
)
def test_every_stage_is_permuted(run, inputs, block_size, tile, dtype):
    places = random_places(inputs, block_size)
    for tokens in (1, tile - 3, tile):
        x = torch.randn(tokens, inputs).to(dtype)
        y, writes = run(x, places, tile, seed=tokens)
        assert torch.equal(y, expected(x, places, tile))
        assert (writes == 1).all()


@pytest.mark.parametrize("tile", [32, 64])
def test_all_values_and_the_direction(run, tile):
    """A cycle is not its own inverse, and values that no arithmetic keeps: bits are moved."""
    places = ((torch.arange(128) + 37) % 128).to(torch.uint8)
    x = torch.randint(-(2**15), 2**15, (tile, 128), dtype=torch.int16)
    y, _ = run(x.view(torch.bfloat16), places, tile)
    y = y.view(torch.int16)
    assert torch.equal(y, x.roll(-37, 1))
    assert not torch.equal(y, x.roll(37, 1))


def test_the_order_of_threads_does_not_matter(run):
    x, places = torch.randn(64, 320).bfloat16(), random_places(320, 64)
    first, _ = run(x, places, 64)
    for seed in range(1, 6):
        assert torch.equal(run(x, places, 64, seed)[0], first)
