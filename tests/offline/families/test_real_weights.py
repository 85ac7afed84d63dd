"""Real weights of other architectures: what is written is the model that was pruned."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.models import GEMMA3, gemma3, smollm2, smollm2_as_qwen2
from benchmarks.packages import cache_dir
from benchmarks.texts import sotu
from permllm_offline.api import prune
from permllm_offline.model.loading import load_model, open_source, parse_device
from permllm_offline.preparation.prepared import prepare
from permllm_offline.text.evaluation import perplexity
from permllm_vllm.checkpoint.validation import validate

pytestmark = pytest.mark.model


NO_GEMMA = pytest.mark.skipif(
    not (cache_dir() / GEMMA3.name).exists(),
    reason="not here: 240 MB, under terms of its own; python -m benchmarks.models gemma3",
)


@pytest.mark.parametrize("model", [smollm2_as_qwen2, pytest.param(gemma3, marks=NO_GEMMA)])
def test_the_checkpoint_answers_like_the_masked_model(
    model: Callable[[], Path], tmp_path: Path
) -> None:
    source, output = model(), tmp_path / "sparse"
    report = prune(
        source,
        output,
        method="wanda+cp",
        dataset=sotu().calibration,
        num_samples=2,
        sequence_length=64,
        evaluation_windows=2,
        ignore=[r"re:model\.layers\.([89]|\d\d)\..*"],  # eight layers are enough, in less time
    )
    assert validate(output) == []
    assert {layer.permutation for layer in report.layers} == {"run time", "folded"}
    prepared = prepare(report.recipe)
    assert prepared.windows is not None
    checkpoint = open_source(str(output))
    loaded = load_model(checkpoint, checkpoint.dtype, parse_device("cpu"))
    # The report measured masked weights in their original order, layer by layer.
    found = perplexity(loaded, prepared.windows.held_out)
    assert found == pytest.approx(report.perplexity_after, rel=0.02)
    assert report.perplexity_before is not None
    assert found > 1.2 * report.perplexity_before


def test_the_qwen2_twin_gives_the_same_logits() -> None:
    tokens = torch.arange(16)[None] * 1000
    with torch.no_grad():
        llama, qwen = (
            load_model(open_source(str(model())), torch.float32, parse_device("cpu"))(tokens).logits
            for model in (smollm2, smollm2_as_qwen2)
        )
    assert torch.equal(llama, qwen)
