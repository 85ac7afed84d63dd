"""Which kernel the operator takes from 65 to 256 tokens, that for few or one for many."""

from itertools import product

import pytest

from tests.cuda.emulated import A100, H100, L4
from tests.cuda.test_kernel_choice import (
    ALL,
    B200,
    DOWN,
    GATE_UP,
    LAYERS,
    MEMORY,
    OUT,
    QKV,
    QKV_8B,
    clocks,
    few_tokens_clocks,
)


def mma_clocks(gpu, shape, tokens, *, int8):
    """Of many_tokens_mma, whose warps have 64 rows by 32 tokens."""
    tile = 64 if gpu.per_block == L4.per_block and not int8 else 128
    weight, activations = 128 * (64 if int8 else 128) + 128 * 16, 256 * tile
    shared = weight * (1 + tile // 32) + activations * (1 + 2)
    tiles = -(-shape[0] // 128) * -(-tokens // tile)
    cache = tiles * (weight + activations) // (gpu.processors * 24)
    return -(-shape[1] // 128) * max(-(-tiles // gpu.processors) * (shared // 128), cache)


def many_tokens_clocks(gpu, shape, tokens, *, permuting, int8, built):
    """Of the kernel that many tokens take, without that for few."""
    padded, steps = -(-shape[0] // 128) * 128, -(-shape[1] // 128)
    memory = padded * steps * (80 if int8 else 144) // (gpu.processors * MEMORY[gpu.capability])
    passes = 1750 + 4 * tokens * shape[1] // (gpu.processors * 24) if permuting else 0
    if int8 or shape[0] % 8 or not built:
        return max(mma_clocks(gpu, shape, tokens, int8=int8), memory) + passes
    plain = steps * min(clocks(gpu, shape[0], tokens, tile) for tile in (64, 128, 256))
    if permuting and gpu is H100:
        own = steps * min(clocks(gpu, shape[0], tokens, tile, permuting=True) for tile in (32, 64))
        if own < plain + passes:
            return max(own, memory)
    return max(plain, memory) + passes


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    ("gpu", "built"),
    [(A100, ""), (H100, ""), (H100, "sm90"), (L4, ""), (B200, ""), (B200, "sm100")],
)
def test_up_to_256_tokens_take_the_kernel_that_takes_fewer_clocks(emulator, gpu, built, int8):
    chosen = set()
    for shape in (*LAYERS, (2048, 2048), (4100, 4096)):
        for tokens, permuting in product((65, 96, 128, 129, 200, 256), (False, True)):
            few = few_tokens_clocks(emulator, gpu, shape, tokens, permuting=permuting, int8=int8)
            if permuting:
                passes = 1750 + 4 * tokens * shape[1] // (gpu.processors * 24)
                few = min(few, passes + few_tokens_clocks(
                    emulator, gpu, shape, tokens, permuting=False, int8=int8
                ))  # fmt: skip
            options = {"gpu": gpu, "built": built, "int8": int8, "permuted": permuting}
            many = many_tokens_clocks(
                gpu, shape, tokens, permuting=permuting, int8=int8, built=built
            )
            assert emulator.clocks(*shape, tokens, **options) == (few, many), (shape, tokens)
            kernel = emulator.choice(*shape, tokens, **options)[0]
            assert (kernel == "few_tokens") == (few < many), (shape, tokens)
            chosen.add(kernel)
            assert emulator.choice(*shape, 257, **options)[0] != "few_tokens"
    assert len(chosen) > 1 or int8


@pytest.mark.parametrize(
    ("gpu", "shape", "int8", "built", "numbers"),
    [  # of tokens, 65 to 256, that the kernel for few takes
        (H100, QKV, False, ALL, ()),
        (H100, OUT, False, ALL, (range(65, 122), range(129, 193))),
        (H100, GATE_UP, False, ALL, ()),
        (H100, DOWN, False, ALL, (range(65, 193),)),
        (H100, QKV_8B, False, ALL, (range(65, 129),)),
        (H100, OUT, False, "", (range(65, 257),)),
        (H100, GATE_UP, False, "", (range(65, 105), range(129, 224))),
        (H100, DOWN, True, ALL, (range(65, 257),)),
        (A100, OUT, False, "", (range(65, 257),)),
        (A100, QKV, False, "", (range(65, 112), range(129, 224))),
        (B200, OUT, False, "sm100", ()),
        (B200, DOWN, False, "sm100", (range(65, 80),)),
        (L4, OUT, False, "", (range(193, 256),)),  # memory binds both up to 192
    ],
)
def test_narrow_layers_take_the_kernel_for_few_tokens_longer(
    emulator, gpu, shape, int8, built, numbers
):
    options = {"gpu": gpu, "int8": int8, "built": built}
    found = [t for t in range(65, 257) if emulator.choice(*shape, t, **options)[1] == 0]
    assert found == [t for some in numbers for t in some]
