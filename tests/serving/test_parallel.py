"""Real processes that share a model: tensor and pipeline parallel, against one process."""

from collections.abc import Sequence

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import Engines, Prompt
from tests.serving.scoring import text_tokens

pytestmark = pytest.mark.serving

TOLERANCE = 1e-3  # float32: measured 8e-5 for SmolLM2, 2e-6 for the random Llama
# bfloat16, mean over the prompt's tokens, because every rank rounds its part of a sum. Measured for
# SmolLM2: sparse 0.098; the dense twin in plain vLLM, three ranks against one, 0.090 (the control);
# dense, one rank, against float32 0.080. For the random Llama: sparse 0.006.
SMOLLM2_TOLERANCE = 0.15
TINY_TOLERANCE = 0.02
RANDOM_PROMPTS = [list(range(5, 105)), list(range(300, 340))]


@pytest.fixture(scope="module")
def text(half: Twins) -> list[Prompt]:
    tokens = text_tokens(half.parent, 160)
    return [tokens[:96], tokens[100:140]]


def test_three_ranks(engines: Engines, half: Twins, text: Sequence[Prompt]) -> None:
    """9 query and 3 KV heads: every rank has one KV head and 3 of the 9 blocks of `o`'s input."""
    one = engines.run(half.sparse, text, tokens=8)
    three = engines.run(half.sparse, text, tokens=8, tensor_parallel_size=3)
    assert three.tokens() == one.tokens()
    assert three.difference(one) < TOLERANCE


def test_three_ranks_of_the_compiled_kernel(
    engines: Engines, half: Twins, text: Sequence[Prompt]
) -> None:
    one = engines.run(half.sparse, text, tokens=1, dtype="bfloat16")
    three = engines.run(half.sparse, text, tokens=1, dtype="bfloat16", tensor_parallel_size=3)
    assert three.mean_prompt_difference(one) < SMOLLM2_TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_ranks_of_one_kv_head(engines: Engines, tiny: Twins, dtype: str) -> None:
    """Both ranks hold a copy of the only KV head."""
    one = engines.run(tiny.sparse, RANDOM_PROMPTS, dtype=dtype)
    two = engines.run(tiny.sparse, RANDOM_PROMPTS, dtype=dtype, tensor_parallel_size=2)
    if dtype == "bfloat16":
        assert two.mean_prompt_difference(one) < TINY_TOLERANCE
    else:
        assert two.tokens() == one.tokens()
        assert two.difference(one) < TOLERANCE


def test_two_pipeline_stages(engines: Engines, tiny: Twins) -> None:
    """Compiled, because vLLM 0.32 on the CPU cannot serve stages eagerly, dense models neither."""
    one = engines.run(tiny.dense, RANDOM_PROMPTS)
    two = engines.run(tiny.sparse, RANDOM_PROMPTS, pipeline_parallel_size=2, enforce_eager=False)
    assert two.tokens() == one.tokens()
    assert two.difference(one) < TOLERANCE
