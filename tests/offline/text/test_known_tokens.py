from pathlib import Path

import pytest

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.text.evaluation import evaluation_windows
from permllm_offline.text.windows import Sampling, sample_windows


def test_tokens_that_the_model_does_not_know_are_refused(
    tiny_model_directory: Path, text_file: Path
) -> None:
    tokenizer = load_tokenizer(open_source(str(tiny_model_directory)))
    largest = int(evaluation_windows(str(text_file), tokenizer, 16, 8).max())
    tokenizer.embeddings = largest
    refused = rf"gives token {largest} \(.*\), and the model knows {largest} \(vocab_size"
    with pytest.raises(OfflineError, match=refused):
        evaluation_windows(str(text_file), tokenizer, 16, 8)
    sampling: Sampling
    for sampling in ("stream", "document"):
        with pytest.raises(OfflineError, match=refused):
            sample_windows(
                [str(text_file)],
                tokenizer,
                num_samples=8,
                sequence_length=16,
                seed=0,
                sampling=sampling,
            )
