"""`torch.compile` around the operator: the answers of a model that is not compiled."""

from pathlib import Path

import pytest
import torch

from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of
from tests.offline.tiny_models import tiny_model
from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4  # measured 2e-6, with routers 1e-5


def test_a_compiled_model(engines: Engines, tiny: Twins) -> None:
    eager = engines.run(tiny.dense, PROMPTS)
    compiled = engines.run(tiny.sparse, PROMPTS, enforce_eager=False)
    assert compiled.backends == {"cpu bfloat16": 8}
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < TOLERANCE


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
def test_experts_in_a_compiled_model(engines: Engines, tmp_path: Path, model_type: str) -> None:
    model, pattern = tiny_model(model_type).to(torch.bfloat16), Pattern(2, 4)
    bake(model, decisions_of(model, pattern, 64), pattern, 64, tmp_path / "sparse")
    prompts = [range(2, 42), range(20, 30)]
    eager = engines.run(tmp_path / "sparse", prompts, max_model_len=64)
    compiled = engines.run(tmp_path / "sparse", prompts, max_model_len=64, enforce_eager=False)
    assert compiled.backends == eager.backends
    assert compiled.tokens() == eager.tokens()
    assert compiled.difference(eager) < TOLERANCE
