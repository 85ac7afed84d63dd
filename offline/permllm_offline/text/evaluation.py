"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from permllm_offline.errors import OfflineError
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.text.calibration import check_length, token_windows
from permllm_offline.text.texts import documents


def evaluation_windows(
    dataset: str, tokenizer: Any, sequence_length: int, max_windows: int | None
) -> Tensor:
    """Cut the first windows of a data set: int64 [windows, sequence_length].

    Raises:
        OfflineError: the data set does not fill one window, or the model has no positions for it.
    """
    check_length(tokenizer, sequence_length)
    windows = token_windows(
        documents(dataset, split="test"), tokenizer, sequence_length, max_windows
    )
    if len(windows) == 0:
        raise OfflineError(
            f"data set {dataset!r} is too short: it does not fill one window of "
            f"{sequence_length} tokens. Give more text, or lower --sequence-length."
        )
    return windows


@products_in_float32()
@torch.inference_mode()
def perplexity(model: Any, windows: Tensor, description: str = "perplexity") -> float:
    """Return exp of the mean negative log-likelihood of every predicted token.

    The first token of a window is context only, as the field does it.

    Args:
        model: causal language model of transformers.
        windows: int64 [windows, sequence_length].
        description: label of the progress bar.

    Returns:
        The perplexity; infinity where it is beyond the range of a float.

    Raises:
        OfflineError: the model answers with what are no numbers.
    """
    total = 0.0
    for window in tqdm(windows, desc=description, unit="window"):
        tokens = window[None].to(model.device)
        logits = model(tokens, use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, tokens[0, 1:], reduction="sum"))
        if math.isnan(total):
            raise OfflineError(
                "the logits of the model are not finite: it or its activations overflow. Give "
                "--dtype float32, or check the weights."
            )
    mean = total / (windows.shape[0] * (windows.shape[1] - 1))
    return math.exp(mean) if mean < 700 else math.inf
