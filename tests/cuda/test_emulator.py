"""The emulator finds mistakes: our kernels without one of their barriers or waits."""

import re

import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.conftest import SOURCES
from tests.cuda.emulated import EmulatorError

CALL = re.compile(r"\b(?:sync_block|sync_warp|wait_copies<[^;]*>)\(\)(?=;)")


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
