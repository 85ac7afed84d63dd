"""The emulator finds mistakes: in small kernels made for it, and in ours without a barrier."""

import ctypes
import re

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.conftest import SOURCES
from tests.cuda.emulated import EmulatorError
from tests.cuda.test_emulated_experts import layers, repeated, routed, stacked

CALL = re.compile(
    r"\b(?:sync_block|sync_warp|wait_copies<[^;]*>|wait_for_previous_kernel|show_tensor_cores)\(\)"
    r"(?=;)"
)


@pytest.fixture(scope="module")
def mistaken(compile_for_host):
    library = compile_for_host("mistaken_kernels.cpp", "-O1", "-Wall")
    library.run_mistaken.restype = ctypes.c_char_p
    return library


@pytest.mark.parametrize(
    ("mistake", "found"),
    [
        ("none", None),
        ("none, by copies", None),
        ("reads before the wait", b"wrong numbers"),
        ("one thread reads before its wait", b"wrong numbers"),
        ("writes before the wait", b"written before the previous kernel had ended"),
        ("one thread writes before its wait", b"written before the previous kernel had ended"),
        ("one thread does not wait", b"a thread never waited for the previous kernel"),
        ("nobody waits", b"a thread never waited for the previous kernel"),
        ("allows the next kernel before the wait", b"allowed before the previous one was waited"),
        ("does not wait for copies", b"wrong numbers"),
        ("no barrier after copies", b"wrong numbers"),
        ("one thread misses a barrier", b"some threads ended before a barrier"),
        ("writes past its memory", b"touched memory that is not there"),
        ("copies are not committed", b"copies were never committed"),
    ],
)
def test_finds_the_mistake(mistaken, mistake, found):
    error = mistaken.run_mistaken(mistake.encode())
    assert error is None if found is None else error is not None and found in error


def runs():
    """What comes to every barrier: splits, several panels, both tiles of many tokens, experts."""
    layer = random_layer(128, 1152)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    x = torch.randn(66, 1152, generator=torch.Generator().manual_seed(0)).bfloat16()

    def product(emulator, kernel, tokens, seed):
        return emulator.linear(x[:tokens], packed, None, 128, kernel=kernel, seed=seed)

    yield lambda emulator, seed: emulator.permute(x[:5], packed.permutation[:1152], seed)
    yield lambda emulator, seed: product(emulator, 0, 40, seed)
    yield lambda emulator, seed: product(emulator, 64, 66, seed)
    yield lambda emulator, seed: product(emulator, 128, 66, seed)
    stages = torch.randn(9, 32, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    yield lambda emulator, seed: emulator.permute_stages(stages, packed.permutation, 32, seed)
    one = [stacked(of_experts, torch.bfloat16) for of_experts in layers(1, 128, 64)]
    weights, ids = routed(64, 1, 1)  # as many pairs as blocks for many are taken for
    yield lambda emulator, seed: emulator.experts(x[:64, :128], weights, ids, *one, 64, seed=seed)[
        0
    ]
    # Of many experts, so that every thread that routes has some.
    many = [repeated(experts, 1024) for experts in one]
    routes = routed(200, 2, 1024)
    yield lambda emulator, seed: emulator.experts(
        x[:1, :128].repeat(200, 1), *routes, *many, 64, seed=seed
    )[0]


NOT_EMULATED = {
    "device.h": "defines them",
    "permuted_mainloop_sm90.h": "inside CUTLASS' kernel: permute_stage.h is what it waits for",
    "many_tokens_sm100.h": "inside CUTLASS' kernel: test_gpu.py waits for a previous kernel there",
}


def calls_in_sources():
    """The barriers and waits in the kernels that are emulated, as the emulator names them."""
    return {
        f"{path.name}:{number} {call.group().partition('(')[0].partition('<')[0]}"
        for path in SOURCES.glob("*.h")
        if path.name not in NOT_EMULATED
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for call in CALL.finditer(line)
    }


def fails(emulator, run, right):
    try:
        return not torch.equal(run(emulator, 0), right)
    except EmulatorError:
        return True


def test_no_barrier_and_no_wait_can_be_left_out(emulator):
    """Each in turn, by its line: the result must change, or the emulator must object."""
    every = list(runs())
    expected = [run(emulator, 0) for run in every]
    sites = emulator.sites()
    assert set(sites) == calls_in_sources(), "a barrier that no run comes to, or none that is known"

    unnoticed = []
    for index, site in enumerate(sites):
        with emulator.without(index):
            if not any(fails(emulator, *pair) for pair in zip(every, expected, strict=True)):
                unnoticed.append(site)
    assert not unnoticed


@pytest.mark.parametrize("block_rows", [192, 256])
def test_nor_in_wide_blocks(emulator, block_rows):
    """Of the kernel for few tokens, with warps that permute and others that do not."""
    layer = random_layer(300, 1152)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    x = torch.randn(40, 1152, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(emulator, seed):
        return emulator.linear(x, packed, None, 300, block_rows=block_rows, seed=seed)

    right = run(emulator, 0)
    unnoticed = []
    for index, site in enumerate(emulator.sites()):
        # One of permute_tokens is reached by others too, that of permute_stage by others alone.
        if site.startswith(("few_tokens.h", "permute_stage.h")) and "show" not in site:
            with emulator.without(index):
                if not fails(emulator, run, right):
                    unnoticed.append(site)
    assert not unnoticed
