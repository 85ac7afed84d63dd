"""`--dtype float16`: the kernel multiplies activations of float16 with values of bfloat16."""

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving


def test_float16(engines: Engines, tiny: Twins) -> None:
    """Nearer to the dense model than that is to itself in bfloat16, to which many rows of x are
    rounded.
    """
    dense = engines.run(tiny.dense, PROMPTS, dtype="float16")
    sparse = engines.run(tiny.sparse, PROMPTS, dtype="float16")
    rounded = engines.run(tiny.dense, PROMPTS, dtype="bfloat16")
    assert sparse.backends == {"cpu bfloat16": 8}
    assert sparse.mean_prompt_difference(dense) < rounded.mean_prompt_difference(dense)
