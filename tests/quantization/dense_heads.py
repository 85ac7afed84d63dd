"""Embeddings and heads of random weights, and what they should answer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm_vllm.quantization.head import can_round, head_tokens
from tests.quantization.sparse_modules import config

WORDS, CHANNELS = 8192, 128  # 2 MiB of bfloat16
TRANSPARENT_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
WEIGHT = torch.empty((WORDS, CHANNELS), dtype=torch.bfloat16)
KERNEL_TOKENS = head_tokens(WEIGHT)
TAKES_ANY = KERNEL_TOKENS > 1 << 30
MOST = 20 if TAKES_ANY else KERNEL_TOKENS
"""Tokens that the kernel takes; where it takes any number, so many are enough to try."""
needs_half = pytest.mark.skipif(
    not head_tokens(WEIGHT.half()),
    reason="this CPU has no kernel for a float16 head",
)
needs_limit = pytest.mark.skipif(
    not MOST or TAKES_ANY, reason="no kernel that takes few tokens alone on this CPU"
)
needs_kernel = pytest.mark.skipif(not MOST, reason="this CPU has no kernel for a dense head")
needs_rounding = pytest.mark.skipif(
    not can_round(WEIGHT), reason="this CPU has no kernel for a head of int8"
)


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(WORDS, CHANNELS, generator=torch.Generator().manual_seed(seed)).to(dtype)


def built(layer_class: type, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.device("cpu"):
        return layer_class(
            WORDS, CHANNELS, params_dtype=dtype, quant_config=config(), prefix="lm_head"
        )


def load(layer: Any, tensor: Tensor) -> None:
    layer.weight.weight_loader(layer.weight, tensor)
    layer.quant_method.process_weights_after_loading(layer)


def logits(layer: Any, tokens: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """What the layer answers, and what it should."""
    x = torch.randn(tokens, CHANNELS, generator=torch.Generator().manual_seed(1)).to(dtype)
    return layer.quant_method.apply(layer, x), x.double() @ layer.weight.double().T


def assert_right(found: tuple[Tensor, Tensor]) -> None:
    answer, expected = found
    torch.testing.assert_close(answer.double(), expected, rtol=1e-2, atol=1e-2)


def may_lie_in_huge_pages(address: int) -> bool:
    """Whether the mapping of this address asks for them, or the system has none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split() or not TRANSPARENT_HUGE_PAGES.exists()
    return False
