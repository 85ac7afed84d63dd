"""The emulator finds mistakes: in small kernels made for it, and in ours without a barrier."""

import ctypes
import re

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.conftest import SOURCES
from tests.cuda.emulated import EmulatorError

CALL = re.compile(r"\b(?:sync_block|sync_warp|wait_copies<[^;]*>)\(\)(?=;)")


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
    """What comes to every barrier: splits, several panels, few tokens and those of a block."""
    layer = random_layer(128, 1152)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    x = torch.randn(66, 1152, generator=torch.Generator().manual_seed(0)).bfloat16()
    yield lambda emulator: emulator.permute(x[:5], packed.permutation[:1152])
    for tokens in (5, 40, 66):
        yield lambda emulator, tokens=tokens: emulator.linear(x[:tokens], packed, None, 128)


def calls_in_sources():
    """The barriers and waits in the kernels, as the emulator names them."""
    return {
        f"{path.name}:{number} {call.group().partition('(')[0].partition('<')[0]}"
        for path in SOURCES.glob("*.h")
        if path.name != "device.h"  # which defines them
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        for call in CALL.finditer(line)
    }


def fails(emulator, run, right):
    try:
        return not torch.equal(run(emulator), right)
    except EmulatorError:
        return True


def test_no_barrier_and_no_wait_can_be_left_out(emulator):
    """Each in turn, by its line: the result must change, or the emulator must object."""
    every = list(runs())
    expected = [run(emulator) for run in every]
    sites = emulator.sites()
    assert set(sites) == calls_in_sources(), "a barrier that no run comes to, or none that is known"

    unnoticed = []
    for index, site in enumerate(sites):
        with emulator.without(index):
            if not any(fails(emulator, *pair) for pair in zip(every, expected, strict=True)):
                unnoticed.append(site)
    assert not unnoticed
