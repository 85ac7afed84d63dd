"""Which kernel and which tile the operator takes, on GPUs that are not here."""

from dataclasses import replace

import pytest

from benchmarks.shapes import LLAMA_2_7B
from tests.cuda.emulated import A100, H100, L4, Gpu
from tests.cuda.layers import PRODUCTS, TOKENS, WIDE, WIDER

B200 = Gpu(100, 148, 227 << 10, 228 << 10)
B300 = Gpu(103, 148, 227 << 10, 228 << 10)
RTX_5090 = Gpu(120, 170, 99 << 10, 100 << 10)
QKV, OUT, GATE_UP, DOWN = LLAMA_2_7B
QKV_8B, GATE_UP_8B = (6144, 4096), (28672, 4096)  # of Llama-3-8B
MANY = (65, 128, 129, 200, 256, 512, 1024, 4096)
ALL = "sm90 sm100 sm103"


@pytest.mark.parametrize(
    ("gpu", "rows", "tokens", "int8", "built", "kernel", "tile"),
    [
        (H100, 4096, 1, False, ALL, "few_tokens", 0),
        (H100, 4096, 64, False, ALL, "few_tokens", 0),
        (H100, 4096, 65, False, ALL, "few_tokens", 0),  # narrow: the others split no inputs
        (H100, 4096, 257, False, ALL, "many_tokens_sm90", 128),
        (H100, 22016, 65, False, ALL, "many_tokens_sm90", 128),
        (H100, 4096, 257, True, ALL, "many_tokens_mma", 128),  # CUTLASS has no such product
        (H100, 4100, 257, False, ALL, "many_tokens_mma", 128),  # rows of y that TMA cannot write
        (H100, 4096, 257, False, "", "many_tokens_mma", 128),  # built without 90a
        (H100, 4096, 257, False, "sm100 sm103", "many_tokens_mma", 128),
        (A100, 4096, 257, False, ALL, "many_tokens_mma", 128),
        (A100, 4096, 64, True, ALL, "few_tokens", 0),
        (L4, 4096, 4096, False, ALL, "many_tokens_mma", 64),  # less shared memory
        (L4, 4096, 4096, True, ALL, "many_tokens_mma", 128),
        (B200, 4096, 64, False, ALL, "few_tokens", 0),
        (B200, 4096, 4096, False, "sm90 sm100", "many_tokens_sm100", 256),
        (B200, 4096, 4096, True, ALL, "many_tokens_mma", 128),
        (B200, 4100, 4096, False, ALL, "many_tokens_mma", 128),
        (B200, 4096, 4096, False, "sm90", "many_tokens_mma", 128),  # the default build
        (B300, 4096, 4096, False, "sm90 sm100", "many_tokens_mma", 128),  # 100a runs on 10.0 alone
        (B300, 4096, 4096, False, ALL, "many_tokens_sm100", 256),  # 100f
        (RTX_5090, 4096, 4096, False, ALL, "many_tokens_mma", 64),  # no tensor memory
    ],
)
def test_kernel(emulator, gpu, rows, tokens, int8, built, kernel, tile):
    choice = emulator.choice(rows, 4096, tokens, int8=int8, gpu=gpu, built=built)
    assert choice == (kernel, tile)


@pytest.mark.parametrize(
    ("gpu", "shape", "tiles"),
    [
        (H100, QKV, (128, 128, 256, 256, 256, 256, 256, 256)),
        (H100, OUT, (64, 64, 64, 128, 128, 128, 256, 256)),
        (H100, GATE_UP, (128, 128, 256, 256, 256, 256, 256, 256)),
        (H100, DOWN, (64, 64, 64, 128, 128, 128, 256, 256)),
        (B200, QKV, (128, 128, 256, 256, 256, 256, 256, 256)),
        (B200, OUT, (64, 64, 128, 128, 128, 256, 256, 256)),
        (B200, GATE_UP, (128, 128, 256, 256, 256, 256, 256, 256)),
        (B200, DOWN, (64, 64, 128, 128, 128, 256, 256, 256)),
    ],
)
def test_tiles(emulator, gpu, shape, tiles):
    found = [emulator.many(*shape, tokens, gpu=gpu, built=ALL)[1] for tokens in MANY]
    assert tuple(found) == tiles


@pytest.mark.parametrize(
    ("shape", "choices"),
    [
        (QKV, "pass 128, pass 128, pass 256, pass 256, pass 256"),
        (QKV_8B, "64, 64, pass 128, pass 128, pass 256"),
        (OUT, "32, 32, 64, 64, pass 128"),
        (GATE_UP, "pass 128, pass 128, pass 256, pass 256, pass 256"),
        (DOWN, "32, 32, 64, 64, pass 128"),
        ((2048, 2048), "32, 32, 32, 32, 64"),
    ],
)
def test_permutes_itself_where_that_takes_less_than_a_pass(emulator, shape, choices):
    """Narrow layers, whose tiles would leave processors without work otherwise."""
    found = []
    for tokens in (65, 128, 129, 256, 512):
        kernel, tile = emulator.many(*shape, tokens, gpu=H100, built=ALL, permuted=True)
        assert kernel in ("many_tokens_sm90", "many_tokens_sm90_permuting")
        found.append(f"{'' if kernel.endswith('permuting') else 'pass '}{tile}")
        unpermuted = emulator.many(*shape, tokens, gpu=H100, built=ALL)
        assert unpermuted[0] == "many_tokens_sm90"
        assert "permuting" in kernel or unpermuted[1] == tile
    assert ", ".join(found) == choices


@pytest.mark.parametrize(
    ("gpu", "rows", "tokens", "int8", "built", "kernel"),
    [
        (H100, 4096, 64, False, ALL, "few_tokens"),
        (H100, 4096, 257, True, ALL, "many_tokens_mma"),
        (H100, 4100, 257, False, ALL, "many_tokens_mma"),
        (H100, 4096, 257, False, "sm100", "many_tokens_mma"),
        (A100, 4096, 257, False, ALL, "many_tokens_mma"),
        (B200, 4096, 65, False, ALL, "many_tokens_sm100"),
    ],
)
def test_only_sm90_has_a_kernel_that_permutes(emulator, gpu, rows, tokens, int8, built, kernel):
    choice = emulator.choice(rows, 4096, tokens, int8=int8, gpu=gpu, built=built, permuted=True)
    assert choice[0] == kernel


def test_the_tests_for_a_gpu_reach_every_kernel_and_tile(emulator):
    """Which tile runs follows from shapes: those that happen to miss one would leave it untried."""
    reached = {
        (*emulator.choice(n, k, tokens, gpu=H100, built="sm90", permuted=block > 0), bias)
        for n, k, block, bias in PRODUCTS
        for tokens in TOKENS
    }
    for choice in (
        ("few_tokens", 0),
        ("many_tokens_mma", 128),
        ("many_tokens_sm90", 64),
        ("many_tokens_sm90", 128),
        ("many_tokens_sm90", 256),
        ("many_tokens_sm90_permuting", 32),
        ("many_tokens_sm90_permuting", 64),
    ):
        assert (*choice, True) in reached
    assert {
        emulator.takes_a_pass(n, k, tokens, gpu=H100)
        for n, k, block, _ in PRODUCTS
        for tokens in TOKENS
        if block > 0 and tokens <= 64
    } == {True, False}
    assert {
        emulator.plan(n, k, 64, int8=False, gpu=H100, permuted=block > 0).rows
        for n, k, block, _ in PRODUCTS
    } == {128, 192, 256}
    assert emulator.plan(WIDER, 256, 64, int8=True, gpu=H100, permuted=True).rows == 192
    assert WIDE // 128 % 2 == 1
    assert choice_of(emulator, WIDE, 1024, 300) == ("many_tokens_sm90", 256)
    # Chains and graphs, whose kernels wait for each other.
    assert choice_of(emulator, 1024, 1024, 200) == ("many_tokens_sm90_permuting", 32)
    assert choice_of(emulator, 1024, WIDE, 300) == ("many_tokens_sm90_permuting", 32)


def choice_of(emulator, rows, inputs, tokens):
    return emulator.choice(rows, inputs, tokens, gpu=H100, built="sm90", permuted=True)


def clocks(gpu, rows, tokens, tile, *, permuting=False):
    """The model of kernel_choice.h, written down once more: clocks for 128 inputs.

    Shared memory moves 128 bytes a clock: what TMA writes, and what products read of it. wgmma
    reads activations for every 64 rows; on sm_100 each of two processors holds half of them.
    Permuting reads 2 bytes a lane and writes 4.
    """
    row_cluster = 1 if permuting or (gpu is H100 and tile == 64) else 2
    token_cluster = 2 if permuting else 1
    weight, places, activations = 128 * 128, 128 * 16, 128 * 2 * tile
    if gpu is H100:
        shared = weight + places + activations + weight + places + 2 * activations
        shared += 3 * activations if permuting else 0
    else:
        shared = 2 * (weight + places + activations // 2)
    row_tiles = -(-rows // 128)
    token_tiles = -(-tokens // tile)
    tiles = -(-row_tiles // row_cluster) * row_cluster
    tiles *= -(-token_tiles // token_cluster) * token_cluster
    rounds = -(-tiles // gpu.processors)
    bytes_of_tile = 128 * 128 * 9 // 8 // token_cluster + 2 * 128 * tile // row_cluster
    return max(rounds * shared // 128, tiles * bytes_of_tile // (gpu.processors * 24))


LAYERS = [*LLAMA_2_7B, QKV_8B, (8, 128), (1000, 1000), (1152, 896), (128256, 4096)]
SOME = (65, 100, 129, 300, 1000, 3000, 8192)


@pytest.mark.parametrize("gpu", [H100, B200], ids=["sm90", "sm100"])
def test_no_tile_takes_fewer_clocks(emulator, gpu):
    for rows, inputs in LAYERS:
        for tokens in SOME:
            tile = emulator.many(rows, inputs, tokens, gpu=gpu, built=ALL)[1]
            best = min(clocks(gpu, rows, tokens, other) for other in (64, 128, 256))
            assert clocks(gpu, rows, tokens, tile) == best, (rows, inputs, tokens)


def test_the_pass_is_taken_where_it_takes_no_more_clocks(emulator):
    """A microsecond, and activations read and written once more."""
    chosen = set()
    for rows, inputs in LAYERS:
        for tokens in SOME:
            steps = -(-inputs // 128)
            own = {t: steps * clocks(H100, rows, tokens, t, permuting=True) for t in (32, 64)}
            plain = {t: steps * clocks(H100, rows, tokens, t) for t in (64, 128, 256)}
            passes = 1750 + 2 * 2 * tokens * inputs // (132 * 24)
            kernel, tile = emulator.many(
                rows, inputs, tokens, gpu=H100, built="sm90", permuted=True
            )
            chosen.add(kernel)
            if kernel.endswith("permuting"):
                assert own[tile] == min(own.values()) < min(plain.values()) + passes
            else:
                assert plain[tile] == min(plain.values()) <= min(own.values()) - passes
    assert len(chosen) == 2


@pytest.mark.parametrize(
    ("gpu", "shape", "int8", "passes"),
    [  # the numbers of tokens, of 1 to 64, that a pass permutes
        (H100, QKV, False, ()),
        (H100, QKV_8B, False, ()),
        (H100, OUT, False, ()),
        (H100, GATE_UP, False, ()),
        (H100, GATE_UP_8B, False, ()),
        (H100, DOWN, False, ()),
        (H100, GATE_UP, True, (range(17, 33), range(34, 65))),  # wider blocks between
        (A100, GATE_UP, False, ()),
        (B200, GATE_UP, False, (range(8, 65),)),
        (L4, GATE_UP, False, ()),  # permuting hides behind bytes that take longer
        (RTX_5090, GATE_UP, True, ()),
    ],
)
def test_a_pass_permutes_for_the_kernel_for_few_tokens(emulator, gpu, shape, int8, passes):
    """Where a product has so many tokens that shared memory binds it."""
    found = [t for t in range(1, 65) if emulator.takes_a_pass(*shape, t, gpu=gpu, int8=int8)]
    assert found == [t for some in passes for t in some]


MEMORY = {90: 14, 80: 14, 100: 28, 89: 4, 120: 4}
"""Bytes a clock of each processor."""


def plan_clocks(gpu, shape, tokens, plan, *, permuting, int8):
    """The model of few_tokens_plan.h, written down once more."""
    steps = -(-shape[1] // 128)
    weight = plan.rows * (64 if int8 else 128) + plan.rows * 16
    activations = 256 * min(tokens, 64)  # bytes of a step
    tiles = -(-tokens // 64)
    halves = plan.token_tiles == 8  # of the tokens, that read the weights, which two warps share
    reads = plan.rows // (64 if halves else 32) * 256 * 8 * plan.token_tiles
    shared = weight + activations + weight * (1 + halves) + reads
    if permuting:
        shared += 2 * activations + activations  # reads of 2 bytes a lane, and writes
    padded = -(-shape[0] // 128) * 128
    rows = -(-padded // plan.rows)
    blocks = -(-(rows * plan.splits * tiles) // gpu.processors)
    memory = padded * steps * weight // plan.rows // (gpu.processors * MEMORY[gpu.capability])
    sums = 2 * 4 * plan.splits * tokens * padded // (gpu.processors * 24)
    product = max(blocks * plan.steps_per_split * (shared // 128), memory)
    if tiles > 1:  # the cache sends weights to each of them, and activations to all rows
        cache = padded * steps * weight // plan.rows * tiles + rows * steps * 256 * tokens
        product = max(product, cache // (gpu.processors * 24))
    return product + (1750 + sums if plan.splits > 1 else 0)


def splits_of(gpu, shape, tokens, plan):
    """The plan with every number of splits that it may have."""
    steps = -(-shape[1] // 128)
    blocks = -(-(-(-shape[0] // 128) * 128) // plan.rows) * -(-tokens // 64)
    most = 1 if blocks >= gpu.processors else max(1, min(16, steps // 4))
    for splits in range(1, most + 1):
        length = -(-steps // splits)
        if -(-steps // length) == splits:
            yield replace(plan, splits=splits, steps_per_split=length)


def few_tokens_clocks(emulator, gpu, shape, tokens, *, permuting, int8=False):
    """Of the plan that takes the fewest, which is the one that is taken."""
    options = {"int8": int8, "gpu": gpu, "permuted": permuting}
    plans = [
        emulator.plan(*shape, tokens, **options, block_rows=rows)
        for rows in ((128, 192, 256) if tokens > 32 else (128,))
    ]
    if tokens > 64:
        plans = [split for plan in plans for split in splits_of(gpu, shape, tokens, plan)]
    plans = [plan for plan in plans if plan.shared_bytes <= gpu.per_block]
    clocks = [
        plan_clocks(gpu, shape, tokens, plan, permuting=permuting, int8=int8) for plan in plans
    ]
    assert emulator.plan(*shape, tokens, **options) == plans[clocks.index(min(clocks))]
    return min(clocks)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("gpu", [A100, H100, L4, B200, RTX_5090])
def test_few_tokens_take_what_takes_no_more_clocks(emulator, gpu, int8):
    for shape in LAYERS:
        for tokens in (1, 8, 9, 16, 30, 32, 33, 50, 64, 65, 128, 200):
            own, plain = (
                few_tokens_clocks(emulator, gpu, shape, tokens, permuting=permuting, int8=int8)
                for permuting in (True, False)
            )
            passes = 1750 + 2 * 2 * tokens * shape[1] // (gpu.processors * 24)
            if emulator.choice(*shape, tokens, gpu=gpu, built="", int8=int8, permuted=True)[1] > 0:
                continue  # the kernel for many tokens
            taken = emulator.takes_a_pass(*shape, tokens, gpu=gpu, int8=int8)
            assert taken == (own > plain + passes), (shape, tokens)


@pytest.mark.parametrize("shape", [QKV, GATE_UP, QKV_8B, GATE_UP_8B])
def test_few_tokens_are_permuted_while_the_weight_arrives(emulator, shape):
    """The aim on an H100: a permutation takes 2 % of the product at most. By the model, nothing."""
    for tokens in range(1, 65):
        own, plain = (
            few_tokens_clocks(emulator, H100, shape, tokens, permuting=permuting)
            for permuting in (True, False)
        )
        assert own <= 1.02 * plain, tokens


@pytest.mark.parametrize(
    ("gpu", "shape", "tokens", "rows", "splits"),
    [
        (H100, GATE_UP, 32, 128, 1),
        (H100, QKV, 33, 128, 2),
        (H100, QKV, 64, 192, 2),  # 128 blocks for 132 processors
        (H100, GATE_UP, 64, 192, 1),  # 115 blocks; 172 of 128 rows
        (H100, GATE_UP_8B, 64, 256, 1),  # 112 blocks; 150 of 192 rows
        (L4, GATE_UP, 64, 128, 1),  # a block has no more shared memory there
        (RTX_5090, GATE_UP, 64, 128, 1),
    ],
)
def test_rows_of_blocks_for_few_tokens(emulator, gpu, shape, tokens, rows, splits):
    plan = emulator.plan(*shape, tokens, int8=False, gpu=gpu, permuted=True)
    assert (plan.rows, plan.splits) == (rows, splits)


def test_a_pass_is_in_front_of_every_other_kernel_that_does_not_permute(emulator):
    assert emulator.takes_a_pass(*QKV, 65, gpu=H100, built=ALL)
    assert emulator.takes_a_pass(*QKV, 65, gpu=A100)
    assert not emulator.takes_a_pass(*OUT, 65, gpu=H100, built=ALL)  # the mainloop permutes
