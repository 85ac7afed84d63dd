"""`torch.compile` around the operator: the same answers as a dense model compiled the same way."""

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import Engines

pytestmark = pytest.mark.serving

FLOAT32_TOLERANCE = 1e-4  # measured 2e-6
BFLOAT16_TOLERANCE = 0.02  # mean over the prompt's tokens
PROMPTS = [list(range(5, 105)), list(range(300, 340)), [7], list(range(400, 433))]


def test_float32(engines: Engines, tiny: Twins) -> None:
    eager = engines.run(tiny.dense, PROMPTS)
    compiled = engines.run(tiny.sparse, PROMPTS, enforce_eager=False)
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < FLOAT32_TOLERANCE


def test_bfloat16(engines: Engines, tiny: Twins) -> None:
    dense, sparse = (
        engines.run(model, PROMPTS, dtype="bfloat16", enforce_eager=False)
        for model in (tiny.dense, tiny.sparse)
    )
    assert sparse.mean_prompt_difference(dense) < BFLOAT16_TOLERANCE
