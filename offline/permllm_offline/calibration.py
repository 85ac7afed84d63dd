"""Windows of tokens, cut from the documents of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.texts import documents

SEPARATOR = "\n\n"
MAX_TOKENS = 8_000_000
"""Tokens read at most: enough to sample from, little enough to hold in memory."""


@dataclass(frozen=True)
class CalibrationWindows:
    """Windows to calibrate on, and further ones of the same data that calibration never sees."""

    calibration: Tensor
    held_out: Tensor


def token_windows(
    texts: Iterable[str], tokenizer: Any, sequence_length: int, max_windows: int | None
) -> Tensor:
    """Cut the joined documents into non-overlapping windows; the ragged end is dropped.

    Returns:
        int64 [windows, sequence_length].
    """
    limit = MAX_TOKENS if max_windows is None else max_windows * sequence_length
    stream: list[int] = []
    for tokens in _tokens(texts, tokenizer):
        stream.extend(tokens)
        if len(stream) >= limit:
            break
    count = min(len(stream), limit) // sequence_length
    return torch.tensor(stream[: count * sequence_length], dtype=torch.long).reshape(
        count, sequence_length
    )


def _tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    for text in texts:
        # verbose=False: a document longer than the context is cut into windows right after.
        yield tokenizer(text + SEPARATOR, add_special_tokens=False, verbose=False)["input_ids"]


def sample_windows(
    dataset: str,
    tokenizer: Any,
    *,
    num_samples: int,
    sequence_length: int,
    seed: int,
    num_held_out: int = 0,
) -> CalibrationWindows:
    """Draw calibration windows at random from a data set.

    Args:
        dataset: what ``texts.documents`` reads.
        tokenizer: of the model, transformers API.
        num_samples: calibration windows.
        sequence_length: tokens per window.
        seed: of the draw; the same seed gives the same windows.
        num_held_out: further windows, as many of these as the data allow.

    Raises:
        OfflineError: fewer than ``num_samples`` windows in the data set.
    """
    windows = token_windows(documents(dataset), tokenizer, sequence_length, None)
    if len(windows) < num_samples:
        raise OfflineError(
            f"data set {dataset!r} is too short: it gives {len(windows)} windows of "
            f"{sequence_length} tokens, --num-samples asks for {num_samples}. Give more text, or "
            "lower --num-samples or --sequence-length."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(windows), generator=generator)
    chosen, rest = order[:num_samples], order[num_samples : num_samples + num_held_out]
    return CalibrationWindows(windows[chosen], windows[rest])
