"""`torch.compile` around the operator: the answers of a dense model that is not compiled."""

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4  # measured 2e-6


def test_a_compiled_model(engines: Engines, tiny: Twins) -> None:
    eager = engines.run(tiny.dense, PROMPTS)
    compiled = engines.run(tiny.sparse, PROMPTS, enforce_eager=False)
    assert compiled.backends == {"cpu bfloat16": 8}
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < TOLERANCE
