"""Text that a model writes itself: calibration windows that need no data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.model.conventions import begin_token
from permllm_offline.model.float32_products import products_in_float32

PIECE = 256
"""Tokens of one piece of text, where a window is not shorter. Attention over longer ones costs more
than it adds; a window holds several, as windows cut from joined documents do."""

PIECES_AT_ONCE = 64


@products_in_float32()
@torch.no_grad()
def sample_text(model: Any, num_windows: int, sequence_length: int, seed: int) -> Tensor:
    """Sample windows from a causal language model at temperature 1.

    Each piece begins with a token drawn uniformly from the vocabulary, so that pieces differ in
    subject and kind, and goes on with the model's own distribution (as LLM-QAT does for its
    calibration, arXiv 2305.17888). ``conventions.begin_token`` comes before.

    Args:
        model: causal language model of transformers.
        num_windows: windows to return.
        sequence_length: tokens of each.
        seed: the same seed gives the same windows on the same machine.

    Returns:
        int64 [num_windows, sequence_length] on the CPU.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    tokens, length = num_windows * sequence_length, min(PIECE, sequence_length)
    stream = torch.empty(0, dtype=torch.int64)
    with tqdm(total=tokens, desc="sampled text", unit="token") as progress:
        while (missing := tokens - len(stream)) > 0:
            count = min(PIECES_AT_ONCE, -(-missing // length))
            pieces = _pieces(model, count, length, generator, progress).cpu()
            stream = torch.cat([stream, pieces.flatten()])
    windows, begin = (
        stream[:tokens].reshape(num_windows, sequence_length),
        begin_token(model.config),
    )
    if begin is not None:
        windows[:, 0] = begin
    return windows


def _pieces(
    model: Any, count: int, length: int, generator: torch.Generator, progress: tqdm
) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    shape, device = (count, 1), model.device
    token = torch.randint(vocabulary, shape, generator=generator, device=device)
    tokens, cache = [token], None
    begin = begin_token(model.config)
    if begin is not None:
        tokens.insert(0, torch.full_like(token, begin))
        token = torch.cat(tokens, dim=1)
        progress.update(count)
    for _ in range(length - len(tokens)):
        output = model(token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        # The largest of p / Exponential(1) is a draw from p.
        probabilities = output.logits[:, -1].float().softmax(-1)
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        token = (probabilities / noise).argmax(-1, keepdim=True)
        tokens.append(token)
        progress.update(count)
    progress.update(count)
    return torch.cat(tokens, dim=1)
