"""What a server says about a fixed text: log-probabilities of its tokens, and greedy tokens."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.engines.server import Server

LICENSE = Path(__file__).parents[2] / "LICENSE"  # English text that does not change
ARGUMENTS = (
    *("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"),
    *("--num-gpu-blocks-override", "64"),
)


def text_tokens(model: Path, count: int) -> list[int]:
    """The first tokens of the fixed text."""
    return AutoTokenizer.from_pretrained(model).encode(LICENSE.read_text())[:count]


def prompt_log_probabilities(server: Server, prompt: Sequence[int]) -> Tensor:
    """Log-probability of every prompt token but the first, given those before it: `[tokens - 1]`.

    The server computes all positions of the prompt in one step.
    """
    answer = server.client().completions.create(
        model=str(server.model),
        prompt=list(prompt),
        max_tokens=1,
        temperature=0,
        extra_body={"prompt_logprobs": 0},
    )
    entries = answer.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    pairs = zip(prompt[1:], entries[1:], strict=True)
    return torch.tensor([entry[str(token)]["logprob"] for token, entry in pairs])
