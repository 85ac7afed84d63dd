"""Every family: vLLM answers as Transformers does with the same weights set to zero.

Tiny random models with permutations at random, in float32. Each has its own names, fused layers,
biases and norms, and vLLM its own model class for it.
"""

from pathlib import Path

import pytest
import torch

from permllm_offline.families import FAMILIES
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import tiny_model
from tests.serving.engine import Engines

pytestmark = pytest.mark.serving

BLOCK, PATTERN = 64, Pattern(2, 4)
PROMPT = range(2, 42)  # longer than the window of Gemma's local attention
TOKENS = 8
TOLERANCE = 1e-4  # measured 1e-5
TIED = ("gemma2", "gemma3_text")  # as all published ones are; vLLM's Gemma 2 knows no other


@pytest.mark.parametrize("model_type", FAMILIES)
def test_answers(engines: Engines, tmp_path: Path, model_type: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=model_type in TIED)
    decisions = decisions_of(model, PATTERN, BLOCK)
    bake(model, decisions, PATTERN, BLOCK, tmp_path / "sparse")
    served = engines.run(tmp_path / "sparse", [PROMPT], tokens=TOKENS, max_model_len=64)
    (answer,) = served.answers

    model.set_attn_implementation("eager")  # the others leave out the cap of Gemma 2's attention
    tokens = torch.tensor([[*PROMPT, *answer.tokens]])
    with torch.no_grad():
        expected = dense_twin(model, decisions)(tokens).logits[0, :-1].log_softmax(-1)
        unpruned = model(tokens).logits[0, :-1].log_softmax(-1)
    start = len(PROMPT) - 1
    assert answer.tokens == expected[start:].argmax(-1).tolist()
    found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
    chosen = tokens[0, 1:, None]
    assert (found - expected.gather(1, chosen)[:, 0]).abs().max() < TOLERANCE
    assert (found - unpruned.gather(1, chosen)[:, 0]).abs().max() > 100 * TOLERANCE
