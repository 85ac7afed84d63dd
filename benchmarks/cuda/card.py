"""The GPU that is measured: whether our kernels run on it, and how fast it copies."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.cuda.contestants import CUDA
from benchmarks.cuda.turns import captured, medians
from permllm_vllm.backends import fallback_reason


@dataclasses.dataclass(frozen=True)
class Card:
    """A GPU; `speed` is what a copy moves, in bytes per microsecond."""

    name: str
    speed: float

    def facts(self) -> dict[str, object]:
        """What a result says of it."""
        return {
            "gpu": self.name,
            "cuda": torch.version.cuda,
            "copy_gb_per_s": round(self.speed / 1e3),
        }


def this_card() -> Card:
    """The GPU here, which a line names; raises SystemExit where our kernels do not run on it."""
    reason = fallback_reason(CUDA, torch.bfloat16)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    card = Card(torch.cuda.get_device_name(CUDA), bandwidth())
    print(f"{card.name}, a copy moves {card.speed / 1e3:.0f} GB/s, bfloat16", flush=True)
    return card


def bandwidth() -> float:
    """Bytes per microsecond of a copy of 1 GiB, reading and writing counted."""
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    copy = captured([lambda x: target.copy_(x)] * 2, [source])
    return 2 * source.numel() / medians({"copy": copy}, 10)["copy"]
