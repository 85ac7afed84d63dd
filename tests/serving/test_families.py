"""Every form of family: vLLM answers as Transformers does with the same weights set to zero.

Tiny random models with permutations at random, of bfloat16 or int8 values, which a kernel
multiplies with float32 exactly. Each has its own names, fused layers, biases and norms, and vLLM
its own model class for it.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of, dense_twin, integer_grids
from tests.offline.tiny_models import tiny_model
from tests.serving.engine import Engines, Run

pytestmark = pytest.mark.serving


class Format(NamedTuple):
    """Of a checkpoint."""

    pattern: Pattern = Pattern(2, 4)
    block_size: int = 64
    values: str = "bfloat16"


USUAL = Format()
SERVED = {
    "llama": Format(block_size=128),
    "qwen2": Format(values="int4"),
    "qwen3": Format(values="int8"),
    "gemma3_text": Format(pattern=Pattern(4, 8)),
    "cohere2": USUAL,
    "phi3": USUAL,
    "glm4": USUAL,
    "opt": USUAL,
    "gpt_neox": USUAL,
    "qwen3_moe": Format(pattern=Pattern(4, 8), values="int4"),
    "mixtral": USUAL,
}
"""One of each form of layers that vLLM or its class for models of Transformers has, and formats so
that an engine serves each; nothing of these families depends on them."""
SIZES = {"llama": {"intermediate_size": 256}}  # whole blocks
PROMPT = range(2, 42)  # longer than the window of Gemma's local attention
TOKENS = 8
TOLERANCE = 1e-4  # measured 1e-5
TIED = ("gemma3_text", "cohere2")
"""As all published ones are; vLLM knows no other."""


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A copy with parameters of a dtype; `model.to` would round the angles of positions as well."""
    copy = deepcopy(model)
    for parameter in copy.parameters():
        parameter.data = parameter.data.to(dtype)
    return copy


def kernels(served: Run) -> set[str]:
    """What multiplies the linear layers, experts among them."""
    return {name.removeprefix("experts ") for name in served.backends}


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token after the first and the whole vocabulary, float32 [tokens - 1, words]."""
    answer: torch.Tensor = cast(model, torch.float32)(tokens).logits[0, :-1].log_softmax(-1)
    return answer


@pytest.mark.parametrize("model_type", SERVED)
def test_answers(engines: Engines, tmp_path: Path, model_type: str) -> None:
    pattern, block_size, values = SERVED[model_type]
    sizes = SIZES.get(model_type, {})
    model = tiny_model(model_type, tie_word_embeddings=model_type in TIED, **sizes)
    model.set_attn_implementation("eager")  # the others leave out the cap of Gemma 2's attention
    unpruned = cast(model, torch.bfloat16 if values == "bfloat16" else torch.float32)
    pruned = deepcopy(unpruned)
    decisions = decisions_of(pruned, pattern, block_size)
    grids = () if values == "bfloat16" else integer_grids(pruned, decisions, values)
    bake(pruned, decisions, pattern, block_size, tmp_path / "sparse", grids)
    served = engines.run(tmp_path / "sparse", [PROMPT], tokens=TOKENS, max_model_len=64)
    assert kernels(served) == {"cpu bfloat16" if values == "bfloat16" else "cpu int8"}
    (answer,) = served.answers

    tokens = torch.tensor([[*PROMPT, *answer.tokens]])
    expected = log_probabilities(dense_twin(pruned, decisions), tokens)
    other = log_probabilities(unpruned, tokens)
    start = len(PROMPT) - 1
    assert answer.tokens == expected[start:].argmax(-1).tolist()
    found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
    chosen = tokens[0, 1:, None]
    assert (found - expected.gather(1, chosen)[:, 0]).abs().max() < TOLERANCE
    assert (found - other.gather(1, chosen)[:, 0]).abs().max() > 100 * TOLERANCE


def test_linear_attention_in_bfloat16(engines: Engines, tmp_path: Path) -> None:
    """vLLM's takes nothing else on the CPU."""
    unpruned = cast(tiny_model("qwen3_5_text"), torch.bfloat16)
    decisions = decisions_of(unpruned, Pattern(2, 4), 64)
    bake(unpruned, decisions, Pattern(2, 4), 64, tmp_path / "sparse")
    served = engines.run(
        tmp_path / "sparse", [PROMPT], tokens=TOKENS, max_model_len=64, dtype="bfloat16"
    )
    assert kernels(served) == {"cpu bfloat16"}
    (answer,) = served.answers
    tokens = torch.tensor([[*PROMPT, *answer.tokens]])
    found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
    difference, of_another = (
        (found - log_probabilities(one, tokens).gather(1, tokens[0, 1:, None])[:, 0]).abs().mean()
        for one in (dense_twin(unpruned, decisions), unpruned)
    )
    assert difference < 0.1 * of_another  # measured 0.01
