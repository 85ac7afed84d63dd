"""An engine ends beyond its memory limit."""

from pathlib import Path

import pytest

from benchmarks import models
from benchmarks.engines.engine import Engine, EngineError
from benchmarks.models import random_model

pytestmark = pytest.mark.serving

SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 1,
    "vocab_size": 512,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(models, "SHAPES", {"tiny": SHAPE})
        return random_model("tiny")


def test_an_engine_ends_beyond_its_memory_limit(model: Path) -> None:
    with pytest.raises(EngineError, match=r"MiB, more than 0.25 GiB: give a higher"):
        Engine(model, eager=True, memory_limit=0.25)
