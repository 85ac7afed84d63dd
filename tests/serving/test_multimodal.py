"""Models of text and images: vLLM answers with sparse layers as with dense ones, images too.

Images are compared with vLLM's own dense layers: what a tower and its projector give differs
between vLLM and Transformers for some models. On text alone Transformers is the oracle.
"""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoModelForMultimodalLM

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.pipeline import prune
from permllm_offline.recipe.schema import Recipe
from tests.offline.tiny_multimodal import CONFIGURATIONS, PROCESSORS, SPECIAL, tiny_multimodal
from tests.serving.engine import Engines, Run

pytestmark = pytest.mark.serving

QUESTION = list(b"What is this? ")
TOLERANCE = 1e-4  # measured 1e-5
BFLOAT16_ALONE = ("qwen3_5",)
"""On the CPU: vLLM's linear attention takes nothing else."""
WITHOUT_IMAGES = [name for name in CONFIGURATIONS if name not in PROCESSORS]


def twins(model_type: str, directory: Path) -> tuple[Path, Path]:
    """A pruned model, and the same with dense weights."""
    source = tiny_multimodal(model_type, directory / "model")
    text = directory / "text.txt"
    text.write_text("Alice was beginning to get very tired of sitting by her sister. " * 40)
    sizes = {"num_samples": 8, "sequence_length": 32, "evaluation_windows": 0}
    recipe = Recipe(model=str(source), method="wanda+cp", dataset=[str(text)], **sizes)
    prune(recipe, directory / "sparse")
    convert_to_dense(str(directory / "sparse"), directory / "dense")
    return directory / "sparse", directory / "dense"


def run(engines: Engines, model: Path, model_type: str, prompt: Any, **limits: int) -> Run:
    most = {"video": 0, **limits} if model_type.startswith("qwen") else limits
    return engines.run(
        model,
        [prompt],
        tokens=8,
        max_model_len=128,
        dtype="bfloat16" if model_type in BFLOAT16_ALONE else "float32",
        limit_mm_per_prompt=most,
        skip_tokenizer_init=False,
    )


@pytest.mark.parametrize("model_type", PROCESSORS)
def test_images(engines: Engines, tmp_path: Path, model_type: str) -> None:
    sparse, dense = twins(model_type, tmp_path)
    pixels = numpy.random.default_rng(0).integers(0, 255, (56, 84, 3), dtype=numpy.uint8)
    token = SPECIAL["boi" if model_type == "gemma3" else "image"]
    image = {"image": Image.fromarray(pixels)}
    prompt = {"prompt": f"What is {token} this?", "multi_modal_data": image}
    one, other = (run(engines, path, model_type, prompt, image=1) for path in (sparse, dense))
    assert set(one.backends) - {"experts cpu bfloat16"} == {"cpu bfloat16"}
    assert not other.backends
    without = run(engines, sparse, model_type, {"prompt": "What is this?"}, image=1)
    assert len(without.answers[0].prompt_log_probabilities) < len(
        one.answers[0].prompt_log_probabilities
    )
    if model_type in BFLOAT16_ALONE:
        assert one.mean_prompt_difference(other) < 0.02
    else:
        assert one.tokens() == other.tokens()
        assert one.difference(other) < TOLERANCE


@pytest.mark.parametrize("model_type", WITHOUT_IMAGES)
def test_text(engines: Engines, tmp_path: Path, model_type: str) -> None:
    sparse, dense = twins(model_type, tmp_path)
    served = run(engines, sparse, model_type, QUESTION, image=0)
    assert served.backends.total() == served.backends["cpu bfloat16"] > 0
    (answer,) = served.answers
    tokens = torch.tensor([[*QUESTION, *answer.tokens]])
    whole = AutoModelForMultimodalLM.from_pretrained(dense, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    assert answer.tokens == expected[len(QUESTION) - 1 :].argmax(-1).tolist()
    found = torch.cat([answer.prompt_log_probabilities, answer.log_probabilities])
    assert (found - expected.gather(1, tokens[0, 1:, None])[:, 0]).abs().max() < TOLERANCE
