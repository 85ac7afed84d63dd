"""Even out input channels before weights and inputs are rounded to integers (SmoothQuant).

A layer computes the same when an input channel is divided by a number and its column of the weight
multiplied by it (arXiv 2211.10438, Eq. 3). Kernels round a token's inputs with one step, which its
largest input sets: divided by the root of what is usual there, no channel takes the others' bits.
Numbers are powers of two here, so that neither the division nor the product rounds anything.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from permllm_offline.sparsity.grid import grouped
from permllm_offline.sparsity.importance import row_chunks
from permllm_vllm.checkpoint import int4

STRENGTHS = tuple(tenth / 10 for tenth in range(10))
"""Powers of a channel's root mean square that are tried; of 0, nothing changes."""

LARGEST_EXPONENT = 8
"""Of the powers of two, and of their inverses: float16 has room for it."""

PEAK = 3.0
"""Square of a token's largest input, in mean squares of the strongest channel. In a trial with int8
values the divergence of SmolLM2-135M from its own weights was 0.036 nats, and 0.0089, 0.0093 and
0.0118 with 3, 9 and 27; with int4 values 3 was best too, by less."""

_INPUT_STEPS = 127.0
_LARGEST = {"int8": 127.0, "int4": (int4.LARGEST - int4.SMALLEST) / 2}
"""Steps from 0 to the end of a group of values."""


def choose_exponents(weights: Sequence[Tensor], energy: Tensor, values: str) -> Tensor:
    """Choose what the input channels of some linears are divided by, for the least expected error.

    Args:
        weights: floating [out, in] of each, pruned weights zero.
        energy: float32 [in], mean square of each channel; equal where channels stay equal.
        values: ``int8``, with a step for each row, or ``int4``, with one for a row's every 64
            channels.

    Returns:
        int8 [in]: channel j is divided by ``2 ** exponents[j]``, and column j multiplied by it.
    """
    tried = _candidates(energy.float())
    steps = torch.exp2(tried)
    noise = _weight_noise(weights, energy.float(), steps, values)
    noise += _input_noise(weights, energy.float(), steps)
    return tried[int(noise.argmin())].to(torch.int8)


def multiplied(weight: Tensor, exponents: Tensor | None, columns: Tensor | None = None) -> Tensor:
    """Multiply columns by powers of two: float32 [..., n].

    Args:
        weight: floating [..., n].
        exponents: int8 [in], or None where nothing is smoothed.
        columns: int64 [..., n], the channel of each weight; otherwise n is in.
    """
    if exponents is None:
        return weight.float()
    powers = torch.exp2(exponents.to(weight.device, torch.float32))
    return weight.float() * (powers if columns is None else powers[columns])


def divided_by(numbers: Tensor, exponents: Tensor | None) -> Tensor:
    """Divide numbers by powers of two, in their own dtype, which rounds nothing.

    Args:
        numbers: floating [n], one of each row of a linear or channel of a norm.
        exponents: int8 [n], or None where nothing is smoothed.
    """
    return numbers if exponents is None else multiplied(numbers, -exponents).to(numbers.dtype)


def _candidates(energy: Tensor) -> Tensor:
    """Whole exponents for every strength: float32 [strengths, in], their mean about 0.

    Channels that are always 0 in the calibration text stay as they are.
    """
    alive = energy > 0
    if not alive.any():
        return torch.zeros(1, len(energy), device=energy.device)
    levels = torch.where(alive, energy, 1.0).log2() / 2
    levels = torch.where(alive, levels - levels[alive].mean(), 0.0)
    strengths = torch.tensor(STRENGTHS, device=energy.device)[:, None]
    return (strengths * levels).round_().clamp_(-LARGEST_EXPONENT, LARGEST_EXPONENT)


def _weight_noise(weights: Sequence[Tensor], energy: Tensor, steps: Tensor, values: str) -> Tensor:
    """Expected squared error of the outputs from rounding the weights: float32 [strengths]."""
    group = int4.GROUP if values == "int4" else len(energy)
    met = grouped(energy / steps.square(), group).sum(-1)
    squares = torch.zeros_like(met)
    for weight in weights:
        for rows in row_chunks(weight.shape):
            part = weight[rows].float().abs()
            for index, step in enumerate(steps):
                largest = grouped(part * step, group).amax(-1)
                squares[index] += largest.square_().sum(0)
    return (squares * met).sum(1) / _LARGEST[values] ** 2


def _input_noise(weights: Sequence[Tensor], energy: Tensor, steps: Tensor) -> Tensor:
    """The same from rounding the inputs of a token to 8 bits."""
    powers = torch.zeros_like(energy)
    for weight in weights:
        for rows in row_chunks(weight.shape):
            powers += weight[rows].float().square().sum(0)
    squares = steps.square()
    largest = PEAK * (energy / squares).amax(1)
    return largest * (squares @ powers) / _INPUT_STEPS**2
