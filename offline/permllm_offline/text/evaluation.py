"""Perplexity over non-overlapping windows."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from permllm_offline.errors import OfflineError
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.text.documents import documents
from permllm_offline.text.paper_protocol import Protocol, paper_name, paper_windows
from permllm_offline.text.row_text import TEXT_FIELD, RowText
from permllm_offline.text.windows import check_length, check_tokens, token_windows

logger = logging.getLogger(__name__)

MANY_WINDOWS = 1000
"""From here on a user who has not said how many is told."""


def evaluation_windows(
    dataset: str,
    tokenizer: Any,
    sequence_length: int,
    max_windows: int | None,
    *,
    protocol: Protocol = "rows",
    text_field: str = TEXT_FIELD,
) -> Tensor:
    """Cut the first windows of a data set: int64 [windows, sequence_length].

    Args:
        dataset: what ``text.documents.documents`` reads.
        tokenizer: of the model, from ``loading.load_tokenizer``.
        sequence_length: tokens per window.
        max_windows: by default as many as there are.
        protocol: ``rows`` tokenizes each row alone, ``paper`` is ``paper_windows``.
        text_field: what is read of a row, see ``row_text.RowText``.

    Raises:
        OfflineError: the data set does not fill one window, the model has no positions for it or
            does not know its tokens, or papers have no protocol for it.
    """
    check_length(tokenizer, sequence_length)
    rows = RowText(text_field, tokenizer)
    if protocol == "paper":
        windows = paper_windows(dataset, tokenizer, sequence_length, max_windows, rows)
    else:
        _warn_of_papers(dataset, sequence_length)
        texts = documents(dataset, "test", rows)
        windows = token_windows(texts, tokenizer, sequence_length, max_windows)
    if len(windows) == 0:
        raise OfflineError(
            f"data set {dataset!r} is too short: it does not fill one window of "
            f"{sequence_length} tokens. Give more text, or lower --sequence-length."
        )
    check_tokens(tokenizer, windows)
    if max_windows is None and len(windows) >= MANY_WINDOWS:
        logger.warning(
            "the perplexity is measured on %s windows of %d tokens, one after the other: the "
            "progress bar says how long after the first, and --max-windows N takes the first N",
            f"{len(windows):,}",
            sequence_length,
        )
    return windows


def _warn_of_papers(dataset: str, sequence_length: int) -> None:
    if paper_name(dataset) is not None:
        logger.warning(
            "%s is read row by row, in windows of %d tokens: compare the perplexity with others of "
            "this command, and with published ones only under --protocol paper",
            dataset,
            sequence_length,
        )


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
