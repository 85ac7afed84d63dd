"""Which kernel and which tile the operator takes, on GPUs that are not here."""

import pytest

from benchmarks.shapes import LLAMA_2_7B
from tests.cuda.emulated import A100, H100, L4, Gpu

B200 = Gpu(100, 148, 227 << 10, 228 << 10)
QKV, OUT, GATE_UP, DOWN = LLAMA_2_7B


@pytest.mark.parametrize(
    ("gpu", "rows", "tokens", "int8", "has_sm90", "kernel", "tile"),
    [
        (H100, 4096, 1, False, True, "few_tokens", 0),
        (H100, 4096, 64, False, True, "few_tokens", 0),
        (H100, 4096, 65, False, True, "many_tokens_sm90", 64),
        (H100, 4096, 65, True, True, "many_tokens_mma", 128),  # CUTLASS has no such product
        (H100, 4100, 65, False, True, "many_tokens_mma", 128),  # rows of y that TMA cannot write
        (H100, 4096, 65, False, False, "many_tokens_mma", 128),  # built without 90a
        (A100, 4096, 65, False, True, "many_tokens_mma", 128),
        (A100, 4096, 64, True, True, "few_tokens", 0),
        (B200, 4096, 4096, False, True, "many_tokens_mma", 128),  # sm_90a code runs on 9.0 alone
        (L4, 4096, 4096, False, True, "many_tokens_mma", 64),  # less shared memory
        (L4, 4096, 4096, True, True, "many_tokens_mma", 128),
    ],
)
def test_kernel(emulator, gpu, rows, tokens, int8, has_sm90, kernel, tile):
    choice = emulator.choice(rows, 4096, tokens, int8=int8, gpu=gpu, has_sm90=has_sm90)
    assert choice == (kernel, tile)


@pytest.mark.parametrize(
    ("shape", "tiles"),
    [
        # tokens: 65, 128, 129, 200, 256, 512, 1024, 4096
        (QKV, (128, 128, 256, 256, 256, 256, 256, 256)),
        (OUT, (64, 64, 64, 128, 128, 128, 256, 256)),
        (GATE_UP, (128, 128, 256, 256, 256, 256, 256, 256)),
        (DOWN, (64, 64, 64, 128, 128, 128, 256, 256)),
    ],
    ids=["qkv", "o", "gate_up", "down"],
)
def test_tiles_of_sm90(emulator, shape, tiles):
    tokens = (65, 128, 129, 200, 256, 512, 1024, 4096)
    found = [emulator.choice(*shape, t, int8=False, gpu=H100, has_sm90=True)[1] for t in tokens]
    assert tuple(found) == tiles


def clocks(rows, tokens, tile):
    """The model of kernel_choice.h, written down once more: clocks for 128 inputs."""
    cluster, shared = {256: (2, 1824), 128: (2, 1056), 64: (1, 672)}[tile]
    row_tiles = -(-rows // 128)
    tiles = -(-row_tiles // cluster) * cluster * -(-tokens // tile)
    rounds = -(-tiles // H100.processors)
    bytes_of_tile = 128 * 128 * 9 // 8 + 2 * 128 * tile // cluster
    return max(rounds * shared, tiles * bytes_of_tile // (H100.processors * 24))


def test_no_tile_of_sm90_takes_fewer_clocks(emulator):
    shapes = [*LLAMA_2_7B, (8, 128), (1000, 1000), (128256, 4096)]
    for rows, inputs in shapes:
        for tokens in (65, 100, 129, 300, 1000, 3000, 8192):
            gpu = {"gpu": H100, "has_sm90": True, "int8": False}
            tile = emulator.choice(rows, inputs, tokens, **gpu)[1]
            best = min(clocks(rows, tokens, other) for other in (64, 128, 256))
            assert clocks(rows, tokens, tile) == best, (rows, inputs, tokens)
