"""What a server says about a fixed text: log-probabilities of its tokens, and greedy tokens."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.server import Server, serve

LICENSE = Path(__file__).parents[2] / "LICENSE"  # English text that does not change
ARGUMENTS = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4")


def start(stack: ExitStack, *servers: tuple[Path, Sequence[str]]) -> list[Server]:
    """Start servers at the same time, each a model and arguments; the stack stops them."""
    with ThreadPoolExecutor(len(servers)) as pool:
        contexts = [serve(model, *ARGUMENTS, *arguments) for model, arguments in servers]
        started = [pool.submit(context.__enter__) for context in contexts]
        for context, future in zip(contexts, started, strict=True):
            if future.exception() is None:
                stack.push(context.__exit__)
        return [future.result() for future in started]


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


def windowed_log_probabilities(server: Server, tokens: Sequence[int], window: int) -> Tensor:
    """The same for every window of the text by itself: a step has `window` tokens."""
    starts = range(0, len(tokens), window)
    return torch.cat([prompt_log_probabilities(server, tokens[s : s + window]) for s in starts])
