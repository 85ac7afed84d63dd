"""int8 values in bfloat16: log-probabilities against a dense model of the dequantised weights.

Transformers computes those in float32. The tolerance is what the kernel promises of a layer's
result (`docs/cpu.md`: rounding activations to 8 bits costs 1.2e-2 at most) for as many sparse
layers as follow one another, whose errors are independent, relative to the spread of the logits.
"""

import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.quantization.head import can_round
from tests.offline.baked_models import bake, decisions_of, integer_grids
from tests.offline.tiny_models import tiny_llama, tiny_model
from tests.serving.engine import PROMPTS, Engines, Run

pytestmark = pytest.mark.serving

BLOCK, PATTERN = 64, Pattern(2, 4)
SPARSE_LAYERS = 8  # one after the other: q/k/v, o, gate/up and down, twice
TOLERANCE = 1.2e-2 * math.sqrt(SPARSE_LAYERS)  # 0.034
# Measured:
#   int8 in bfloat16 / dense float32                          0.022
#   dense bfloat16 / dense float32 (control)                  0.009
#   int8 in bfloat16 / one block of 8 x 64 damaged            0.166
TOKENS = 8
BLOCK_ROWS = 8  # of the smallest packed block
needs_rounding = pytest.mark.skipif(
    not can_round(torch.empty((512, 256), dtype=torch.bfloat16)),
    reason="this CPU has no kernel for a head of int8",
)


@pytest.fixture(scope="module")
def twin() -> Any:
    """A dense model, in which pruned weights are zero and the others are on their int8 grids."""
    return tiny_llama(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=4,
        vocab_size=512,
        max_position_embeddings=512,
        initializer_range=0.05,  # with larger weights attention, all but hard, amplifies errors
    )


@pytest.fixture(scope="module")
def directory(twin: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("int8") / "sparse"
    decisions = decisions_of(twin, PATTERN, BLOCK)
    grids = integer_grids(twin, decisions, spread=0.0)  # as random inputs are: nothing to smooth
    bake(twin, decisions, PATTERN, BLOCK, output, grids)
    return output


@pytest.fixture(scope="module")
def served(engines: Engines, directory: Path) -> Run:
    return engines.run(directory, PROMPTS, tokens=TOKENS, dtype="bfloat16")


def mean_error(served: Run, model: Any) -> float:
    """Of the log-probabilities of prompts and answers, in units of the spread of the logits."""
    errors = []
    for prompt, answer in zip(PROMPTS, served.answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.tokens]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1]
        expected = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
        found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
        errors.append((found - expected).abs() / logits.std())
    return float(torch.cat(errors).mean())


def test_log_probabilities_agree(served: Run, twin: Any) -> None:
    assert served.backends == {"cpu int8": SPARSE_LAYERS}
    assert mean_error(served, twin) < TOLERANCE


def test_one_damaged_block_is_noticed(served: Run, twin: Any) -> None:
    """The negative control: served is what it was, and the twin is not."""
    damaged = deepcopy(twin)
    with torch.no_grad():
        damaged.model.layers[0].self_attn.o_proj.weight[:BLOCK_ROWS, :BLOCK] *= -1
    assert mean_error(served, damaged) > TOLERANCE


@needs_rounding
def test_a_head_of_int8(engines: Engines, served: Run, directory: Path) -> None:
    """Asked for by an option; without it the head is multiplied as it is."""
    rounded = engines.run(
        directory,
        PROMPTS,
        tokens=TOKENS,
        dtype="bfloat16",
        additional_config={"permllm": {"head": "int8"}},
    )
    assert rounded.backends == served.backends
    assert 1e-4 < rounded.mean_prompt_difference(served) < 0.03


@needs_rounding
def test_an_embedding_is_a_head_of_int8(engines: Engines, tmp_path: Path) -> None:
    """Of Gemma 2, whose class asks no plugin for the method of its embedding."""
    model = tiny_model("gemma2", tie_word_embeddings=True, initializer_range=0.05)
    decisions = decisions_of(model, PATTERN, BLOCK)
    bake(model.to(torch.bfloat16), decisions, PATTERN, BLOCK, tmp_path / "sparse")
    as_it_is, rounded = (
        engines.run(
            tmp_path / "sparse",
            [range(2, 42)],
            tokens=TOKENS,
            dtype="bfloat16",
            max_model_len=64,
            additional_config={"permllm": {"head": head}},
        )
        for head in ("dense", "int8")
    )
    assert 1e-5 < rounded.mean_prompt_difference(as_it_is) < 0.03


def test_an_option_that_is_unknown(engines: Engines, directory: Path) -> None:
    refused = engines.refusal(directory, additional_config={"permllm": {"tail": "int8"}})
    assert "tail: Extra inputs are not permitted" in refused
