"""Models with recurrent states: prompts longer than a block of the cache, and found in it again."""

from pathlib import Path

import pytest
import torch

from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import tiny_model
from tests.serving.engine import Engines
from tests.serving.test_families import TIED, cast, log_probabilities

pytestmark = pytest.mark.serving

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
PATTERN = Pattern(2, 4)
PROMPT = [2 + 7 * at % 53 for at in range(300)]
TOKENS = 8
TOLERANCE = 1e-3  # of 300 tokens; measured 1e-4


@pytest.mark.parametrize("model_type", ["granitemoehybrid", "falcon_h1", "nemotron_h", "lfm2"])
def test_long_prompts(engines: Engines, tmp_path: Path, model_type: str) -> None:
    model = tiny_model(
        model_type, max_position_embeddings=512, tie_word_embeddings=model_type in TIED
    )
    pruned = cast(model, torch.bfloat16)
    decisions = decisions_of(pruned, PATTERN, 64)
    bake(pruned, decisions, PATTERN, 64, tmp_path / "sparse")
    options = {"tokens": TOKENS, "max_model_len": 512, "score_prompts": False}
    served = engines.run(tmp_path / "sparse", [PROMPT], [PROMPT], **options)
    first, second = served.answers
    assert second.cached > 0
    tokens = torch.tensor([[*PROMPT, *first.tokens]])
    expected = log_probabilities(dense_twin(pruned, decisions), tokens)[len(PROMPT) - 1 :]
    for answer in (first, second):
        assert answer.tokens == expected.argmax(-1).tolist()
        chosen = expected.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
        assert (answer.log_probabilities - chosen).abs().max() < TOLERANCE


def test_drafts_are_refused(tmp_path: Path) -> None:
    """In a process of its own, in which vLLM may start no engine that drafts afterwards."""
    model = tiny_model("granitemoehybrid").to(torch.bfloat16)
    bake(model, decisions_of(model, PATTERN, 64), PATTERN, 64, tmp_path / "sparse")
    with Engines() as engines:
        message = engines.refusal(tmp_path / "sparse", max_model_len=64, speculative_config=NGRAM)
    assert "--speculative-config was given, and the model has layers with recurrent" in message
