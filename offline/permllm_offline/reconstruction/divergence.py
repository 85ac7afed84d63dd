"""The Kullback-Leibler divergence between two heads over one vocabulary, without their logits.

The logits of a window fill a hundred megabytes and more; a few tokens' worth of them fill a cache.
So the loss and its gradient in the hidden state are made together, a few tokens at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from permllm_offline.model.float32_products import product

TOKENS_AT_ONCE = 64


def divergence(
    student: Tensor, teacher: Tensor, head: Tensor, softcap: float | None = None
) -> Tensor:
    """Sum over tokens of KL(softmax(teacher head^T) || softmax(student head^T)), in nats.

    A sum, not a mean: Adam does not care, and its gradient does not underflow in half precision.
    With a softcap c, logits z are c tanh(z / c), as in Gemma 2.

    Args:
        student: [tokens, width], what the head reads; the only input that gets a gradient.
        teacher: [tokens, width], the same of the dense model.
        head: [vocabulary, width], of both.
        softcap: of the logits, or None.

    Returns:
        float32 scalar.
    """
    total: Tensor = _Divergence.apply(student, teacher, head, softcap)
    return total


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, head: Tensor, softcap: float | None
    ) -> Tensor:
        gradient = torch.empty_like(student)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            logits = _capped(product(student[part], head.t()).float(), softcap)
            mine = logits.log_softmax(-1)
            theirs = _capped(product(teacher[part], head.t()).float(), softcap).log_softmax(-1)
            wanted = theirs.exp()
            total += torch.dot(wanted.flatten(), theirs.sub_(mine).flatten())
            difference = mine.exp_().sub_(wanted)
            if softcap is not None:
                difference *= 1 - (logits / softcap).square()
            gradient[part] = product(difference.to(head.dtype), head)
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * scale.to(gradient.dtype), None, None, None


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
