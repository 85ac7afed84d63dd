"""What vLLM does around the layers changes no token: caching, chunks, speculation."""

from pathlib import Path

import pytest

from tests.serving.checkpoints import Twins
from tests.serving.engine import PROMPTS, Engines, Run

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4  # float32: measured 2e-6


@pytest.fixture(scope="module")
def dense(engines: Engines, tiny: Twins) -> Run:
    return engines.run(tiny.dense, PROMPTS)


def test_chunked_prefill(engines: Engines, tiny: Twins, dense: Run) -> None:
    """140 prompt tokens in steps of 32 at most."""
    chunked = engines.run(tiny.sparse, PROMPTS, max_num_batched_tokens=32)
    assert chunked.backends == {"cpu bfloat16": 8}
    assert chunked.tokens() == dense.tokens()
    assert chunked.difference(dense) < TOLERANCE


def test_prefix_caching(engines: Engines, tiny: Twins, dense: Run) -> None:
    """The second batch finds its prompts in the cache, in blocks of 32 tokens."""
    run = engines.run(tiny.sparse, PROMPTS, PROMPTS, score_prompts=False, block_size=32)
    assert run.backends == {"cpu bfloat16": 8}
    assert [answer.cached for answer in run.answers] == [0, 0, 96, 32]
    assert run.tokens() == 2 * dense.tokens()


@pytest.mark.parametrize("target", ["parent", "dense"])
def test_a_sparse_model_drafts(engines: Engines, tiny: Twins, target: str) -> None:
    """For the model it was pruned from, and for its dense twin, which agrees with every token."""
    model: Path = getattr(tiny, target)
    alone = engines.run(model, PROMPTS)
    speculating = engines.run(
        model,
        PROMPTS,
        score_prompts=False,
        speculative_config={
            "method": "draft_model",
            "model": str(tiny.sparse),
            "num_speculative_tokens": 3,
        },
    )
    assert speculating.tokens() == alone.tokens()
    drafted = speculating.counters["vllm:spec_decode_num_draft_tokens"]
    accepted = speculating.counters["vllm:spec_decode_num_accepted_tokens"]
    assert drafted >= len(PROMPTS) * 12
    assert (accepted == drafted) == (target == "dense")
