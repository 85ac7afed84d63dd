"""Real processes that share a model: tensor and pipeline parallel, against one process."""

from collections.abc import Sequence

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines, Prompt
from tests.serving.scoring import text_tokens

pytestmark = pytest.mark.serving

TOLERANCE = 1e-3  # measured 8e-5 for SmolLM2, 2e-6 for the random Llama
KERNEL = "cpu bfloat16"
TRACED = {"mode": "DYNAMO_TRACE_ONCE", "backend": "eager"}


@pytest.fixture(scope="module")
def text(half: Twins) -> list[Prompt]:
    tokens = text_tokens(half.parent, 160)
    return [tokens[:96], tokens[100:140]]


def test_three_ranks(engines: Engines, half: Twins, text: Sequence[Prompt]) -> None:
    """9 query and 3 KV heads: every rank has one KV head and 3 of the 9 blocks of `o`'s input."""
    one = engines.run(half.sparse, text, tokens=4)
    three = engines.run(half.sparse, text, tokens=4, tensor_parallel_size=3)
    assert (one.backends, three.backends) == ({KERNEL: 60}, {KERNEL: 3 * 60})
    assert three.tokens() == one.tokens()
    assert three.difference(one) < TOLERANCE


def test_two_ranks_of_one_kv_head(engines: Engines, tiny: Twins) -> None:
    """Both ranks hold a copy of the only KV head."""
    one = engines.run(tiny.sparse, PROMPTS)
    two = engines.run(tiny.sparse, PROMPTS, tensor_parallel_size=2)
    assert (one.backends, two.backends) == ({KERNEL: 8}, {KERNEL: 2 * 8})
    assert two.tokens() == one.tokens()
    assert two.difference(one) < TOLERANCE


def test_two_pipeline_stages(engines: Engines, tiny: Twins) -> None:
    """Traced, because vLLM 0.32 on the CPU cannot serve stages eagerly, dense models neither."""
    one = engines.run(tiny.dense, PROMPTS)
    two = engines.run(
        tiny.sparse,
        PROMPTS,
        pipeline_parallel_size=2,
        enforce_eager=False,
        compilation_config=TRACED,
    )
    assert two.backends == {KERNEL: 8}
    assert two.tokens() == one.tokens()
    assert two.difference(one) < TOLERANCE
