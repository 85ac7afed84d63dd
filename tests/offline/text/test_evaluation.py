import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import load_model, open_source
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from tests.offline.tiny_models import tiny_llama


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
