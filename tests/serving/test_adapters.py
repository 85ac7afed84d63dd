"""LoRA adapters on layers that are permuted at run time and on folded ones."""

from pathlib import Path
from typing import Any

import pytest

from tests.serving.adapters import RANK, random_adapter
from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4
ENABLED: dict[str, Any] = {
    "enable_lora": True,
    "max_lora_rank": 2 * RANK,
    "score_prompts": False,  # vLLM 0.32 on the CPU cannot with an adapter, dense models neither
}


@pytest.mark.parametrize("implementation", ["vllm", "transformers"])
def test_the_adapter_of_the_dense_model(
    implementation: str, engines: Engines, tiny: Twins, tmp_path: Path
) -> None:
    """It was made for the dense model's channel order, and every linear layer is adapted.

    vLLM's class for models of Transformers has a folded layer before the one whose rows moved.
    """
    options = {**ENABLED, "model_impl": implementation}
    adapter = random_adapter(tiny.dense, tmp_path / "adapter")
    dense = engines.run(tiny.dense, PROMPTS, adapter=adapter, **options)
    sparse = engines.run(tiny.sparse, PROMPTS, adapter=adapter, **options)
    assert sparse.backends == {"cpu bfloat16": 8}
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE
    unadapted = engines.run(tiny.dense, PROMPTS)
    assert unadapted.tokens() != dense.tokens()
