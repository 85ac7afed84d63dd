"""`torch.compile` around the operator: the answers of a dense model that is not compiled."""

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

FLOAT32_TOLERANCE = 1e-4  # measured 2e-6
BFLOAT16_TOLERANCE = 0.02  # mean over the prompt's tokens; measured 4e-3, uncompiled 1e-6


def test_float32(engines: Engines, tiny: Twins) -> None:
    eager = engines.run(tiny.dense, PROMPTS)
    compiled = engines.run(tiny.sparse, PROMPTS, enforce_eager=False)
    assert compiled.backends == {"cpu bfloat16": 8}
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < FLOAT32_TOLERANCE


def test_bfloat16(engines: Engines, tiny: Twins) -> None:
    eager = engines.run(tiny.dense, PROMPTS, dtype="bfloat16")
    compiled = engines.run(tiny.sparse, PROMPTS, dtype="bfloat16", enforce_eager=False)
    assert compiled.backends == {"cpu bfloat16": 8}
    assert compiled.mean_prompt_difference(eager) < BFLOAT16_TOLERANCE
