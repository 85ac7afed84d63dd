"""Every family: vLLM answers as Transformers does with the same weights set to zero.

Tiny random models with permutations at random, of bfloat16 or int8 values, which a kernel
multiplies with float32 exactly. Each has its own names, fused layers, biases and norms, and vLLM
its own model class for it.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from permllm_offline.api import prune
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.loading import load_model, open_source
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of, dense_twin, integer_grids
from tests.offline.tiny_models import (
    NEMOTRON_H_DENSE,
    WITH_EXPERTS,
    as_published,
    save_tokenizer,
    tiny_model,
)
from tests.serving.engine import Engines, Run

pytestmark = pytest.mark.serving


class Format(NamedTuple):
    """Of a checkpoint."""

    pattern: Pattern = Pattern(2, 4)
    block_size: int = 64
    values: str = "bfloat16"


USUAL = Format()
OTHERS = {
    "mistral": Format(pattern=Pattern(4, 8)),
    "qwen3": Format(values="int8"),
    "olmoe": Format(values="int8"),
    "qwen2": Format(values="int4"),
    "qwen3_moe": Format(pattern=Pattern(4, 8), values="int4"),
    "llama": Format(block_size=128),
}
"""So that an engine serves each; nothing of these families depends on it."""
SIZES = {"llama": {"intermediate_size": 256}}  # whole blocks
PROMPT = range(2, 42)  # longer than the window of Gemma's local attention
TOKENS = 8
TOLERANCE = 1e-4  # measured 1e-5
TIED = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "cohere", "cohere2", "cohere2_moe",
        "lfm2", "lfm2_moe")  # fmt: skip
"""As all published ones are; vLLM knows no other of most."""
BFLOAT16_ALONE = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
"""On the CPU: vLLM's linear attention takes nothing else."""
UNSERVED = (*BFLOAT16_ALONE, "gemma4_unified_text")
"""In float32 here; vLLM has the last one inside its model of text and images (test_multimodal)."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
DEEPSEEK_V2_LITE = {
    "q_lora_rank": None,
    "rope_parameters": YARN | {"rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 0.7},
}
NEMOTRON_H_LATENT = {"moe_latent_size": 64, "routed_scaling_factor": 2.5}
IN_GROUPS = {"n_group": 2, "topk_group": 1}
VARIANTS = [
    *WITH_EXPERTS,
    ("deepseek_v2", DEEPSEEK_V2_LITE),
    ("deepseek_v3", IN_GROUPS),
    ("nemotron_h", NEMOTRON_H_DENSE),
    ("nemotron_h", NEMOTRON_H_LATENT),
]


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


@pytest.mark.parametrize(
    ("model_type", "variant"),
    [(name, {}) for name in FAMILIES if name not in UNSERVED] + VARIANTS,
)
def test_answers(
    engines: Engines, tmp_path: Path, model_type: str, variant: dict[str, Any]
) -> None:
    pattern, block_size, values = OTHERS.get(model_type, USUAL)
    sizes = SIZES.get(model_type, {}) | variant
    model = tiny_model(model_type, tie_word_embeddings=model_type in TIED, **sizes)
    for name, parameter in model.named_parameters():
        if ".act_fn." in name:  # of Apertus: vLLM rounds their softplus to bfloat16, here to 0
            torch.nn.init.constant_(parameter, -40)
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


@pytest.mark.parametrize(("model_type", "variant"), [*WITH_EXPERTS, ("granitemoe", {})])
def test_experts_left_dense_are_vllms(
    engines: Engines, tmp_path: Path, model_type: str, variant: dict[str, Any]
) -> None:
    """Of families whose checkpoints have those of a layer in two tensors."""
    model = tiny_model(model_type, tie_word_embeddings=model_type in TIED, **variant)
    as_published(model.to(torch.bfloat16)).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ignore = [r"re:.*\.experts\..*"]
    output = tmp_path / "sparse"
    prune(tmp_path / "model", output, method="magnitude", ignore=ignore, evaluation_windows=0)
    served = engines.run(output, [PROMPT], tokens=TOKENS, max_model_len=64)
    assert not any(name.startswith("experts") for name in served.backends)
    (answer,) = served.answers
    tokens = torch.tensor([[*PROMPT, *answer.tokens]])
    pruned = load_model(open_source(str(output)), torch.float32, torch.device("cpu"))
    found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
    expected = log_probabilities(pruned, tokens).gather(1, tokens[0, 1:, None])[:, 0]
    assert (found - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("model_type", BFLOAT16_ALONE)
def test_log_probabilities_in_bfloat16(engines: Engines, tmp_path: Path, model_type: str) -> None:
    unpruned = cast(tiny_model(model_type), torch.bfloat16)
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
