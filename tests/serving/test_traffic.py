"""A float32 server in mixed traffic: every answer is the one that the request gets alone."""

from collections.abc import Iterator

import pytest

from benchmarks.server import Server, serve
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


def test_the_log_says_that_no_kernel_serves(server: Server) -> None:
    line = server.backend_line()
    assert "backend reference (pytorch) serves 60 sparse linear layers" in line
    assert server.log().count("sparse layers run on the reference backend") == 1
