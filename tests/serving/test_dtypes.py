"""`--dtype float16`: the kernel multiplies activations of float16 with values of bfloat16."""

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 0.003  # mean over the prompt's tokens; measured 2e-4


def test_float16(engines: Engines, tiny: Twins) -> None:
    dense = engines.run(tiny.dense, PROMPTS, dtype="float16")
    sparse = engines.run(tiny.sparse, PROMPTS, dtype="float16")
    assert sparse.backends == {"cpu bfloat16": 8}
    assert sparse.mean_prompt_difference(dense) < TOLERANCE
