"""The GPU benchmark without a GPU."""

import pytest
import torch

from benchmarks.cuda import contestants as cuda_contestants
from benchmarks.cuda import kernels as cuda_kernels
from benchmarks.cuda.contestants import CONTESTANTS, DENSE, INT8, OURS


@pytest.fixture
def replays(monkeypatch):
    """Contestants on the CPU that PyTorch multiplies for; returns the turns that were taken."""
    log = []

    def linear(change=lambda dense: dense):
        def prepare(layer):
            weight = change(layer.dense.float())
            return lambda x: (x.float() @ weight.t()).bfloat16()

        return prepare

    def fails(layer):
        raise RuntimeError("no such library\nand more")

    def captured(calls, inputs):
        name = next(name for name, call in made if call is calls[0])
        assert len({x.data_ptr() for x in inputs}) == len(calls)

        def turn():
            log.append((name, len(inputs[0])))
            return float(len(log))

        return turn

    def copied(prepare):
        return lambda layer, count: [prepare(layer) for _ in range(count)]

    contestants = {
        OURS: linear(),
        INT8: linear(),
        DENSE: linear(),
        "transposed": linear(lambda dense: dense.flip(0)),
        "missing": fails,
    }
    made = []

    def kept(name, prepare):
        def prepared(layer):
            call = prepare(layer)
            made.append((name, call))
            return call

        return prepared

    cpu = torch.device("cpu")
    monkeypatch.setattr(cuda_kernels, "CUDA", cpu)
    monkeypatch.setattr(cuda_contestants, "CUDA", cpu)
    monkeypatch.setattr(cuda_kernels, "copies", lambda _: 2)
    monkeypatch.setattr(cuda_kernels, "captured", captured)
    for name, prepare in contestants.items():
        monkeypatch.setitem(CONTESTANTS, name, copied(kept(name, prepare)))
    return log
