import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from permllm_offline.api import evaluate
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama, tiny_model


def test_perplexity_is_the_mean_over_predicted_tokens() -> None:
    model = tiny_llama()
    windows = torch.randint(0, 64, (3, 10), generator=torch.Generator().manual_seed(2))
    total, count = 0.0, 0
    with torch.no_grad():
        for window in windows:
            probabilities = model(window[None]).logits[0].double().softmax(-1)
            for position in range(9):
                total -= math.log(probabilities[position, window[position + 1]])
                count += 1
    assert perplexity(model, windows) == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_have_no_perplexity(value: float) -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[3] = value
    windows = torch.randint(4, 64, (2, 10), generator=torch.Generator().manual_seed(2))
    with pytest.raises(OfflineError, match=r"logits of the model are not finite.*--dtype float32"):
        perplexity(model, windows)


def test_a_perplexity_beyond_every_float_is_infinite() -> None:
    model: Any = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    windows = torch.randint(0, 64, (2, 10), generator=torch.Generator().manual_seed(2))
    assert perplexity(model, windows) == math.inf


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_windows_beyond_the_positions_of_the_model_are_refused(
    model_type: str, tmp_path: Path
) -> None:
    tiny_model(model_type, max_position_embeddings=16).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "text.txt").write_text(random_text(100, seed=1), encoding="utf-8")
    model, text = tmp_path / "model", tmp_path / "text.txt"
    assert evaluate(model, text, sequence_length=16, max_windows=1).windows == 1
    with pytest.raises(OfflineError, match=r"17 tokens are longer than the 16 positions"):
        evaluate(model, text, sequence_length=17)


def test_text_that_fills_no_window_is_refused(tmp_path: Path, tiny_model_directory: Path) -> None:
    (tmp_path / "short.txt").write_text("w0 w1", encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_directory)
    with pytest.raises(OfflineError, match="does not fill one window of 16 tokens"):
        evaluation_windows(str(tmp_path / "short.txt"), tokenizer, 16, None)


def test_a_model_without_one_of_its_tensors_is_not_evaluated(
    tmp_path: Path, tiny_model_directory: Path
) -> None:
    """Transformers would draw the missing ones at random and say so in a log."""
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OfflineError, match=r"missing: \['model\.layers\.1\.mlp\.down_proj\.weight"):
        load_model(open_source(str(model)), torch.float32, torch.device("cpu"))
