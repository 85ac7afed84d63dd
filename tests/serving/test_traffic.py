"""A float32 server in mixed traffic: every answer is the one that the request gets alone."""

from collections.abc import Iterator

import pytest
import torch

from benchmarks.engines.server import Server, serve
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from tests.serving.checkpoints import Twins
from tests.serving.scoring import ARGUMENTS
from tests.serving.traffic import mixed_traffic

pytestmark = pytest.mark.serving


@pytest.fixture(scope="module")
def server(half: Twins) -> Iterator[Server]:
    with serve(half.sparse, *ARGUMENTS, "--dtype", "float32") as started:
        yield started


def test_traffic_changes_no_answer(server: Server) -> None:
    tally = mixed_traffic(server, compare=True)
    assert (tally.errors, tally.wrong) == ([], [])
    assert tally.compared == tally.completed > 0


@pytest.mark.skipif(not instruction_sets(), reason="the CPU kernels were not built")
def test_the_log_says_that_a_float32_kernel_serves(server: Server) -> None:
    name = CpuBackend(dtype=torch.float32).instruction_set
    said = f"backend cpu ({name}) serves 60 sparse linear layers"
    assert said in server.backend_line(), server.log()[-8000:]
    assert "reference backend" not in server.log()
