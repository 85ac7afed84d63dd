"""`vllm serve` ends with our message where it cannot serve, and without it serves anything else."""

import pytest

from benchmarks.server import ServerError, serve
from tests.serving.checkpoints import Twins
from tests.serving.scoring import ARGUMENTS

pytestmark = pytest.mark.serving


def test_a_dense_checkpoint_is_refused(twins: Twins) -> None:
    with (
        pytest.raises(ServerError, match="permllm-offline prune MODEL --output DIRECTORY") as error,
        serve(twins.dense, *ARGUMENTS, "--quantization", "permllm"),
    ):
        pytest.fail("the server came up")
    assert str(twins.dense) in str(error.value)
