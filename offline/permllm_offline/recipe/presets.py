"""Sets of constants that a user names in place of giving them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.recipe.methods import parse_method

_PAPER_RATES = {"wanda": 1e-3, "ria": 5e-3}
_PAPER_SCALE = 8.0
"""Square root of the block size 64: where the scale of the logits starts in the authors' code."""

PRESETS = ("paper",)


PAPER_METHOD = "permllm-wanda"
"""The paper's own, with the importance of most of its tables."""


def preset(name: str, method: object) -> Mapping[str, Any]:
    """Entries of a recipe that a preset gives.

    ``paper`` gives the constants of arXiv 2510.10136 (Appendix A), and those of its authors' code
    where the paper is silent (weight decay, cosine decay, 16 windows a step, start from noise
    within 1) or counts otherwise: its 50 iterations are 50 epochs of 8 steps. There, the weights
    that the rate of the paper moves are multiplied by about 8 before Sinkhorn; here, the rate is.

    Args:
        name: of ``PRESETS``.
        method: of the recipe, or None for the paper's; the rate depends on its importance.

    Raises:
        OfflineError: unknown preset, or method.
    """
    if name not in PRESETS:
        raise OfflineError(f"preset {name!r} is not known: give one of {', '.join(PRESETS)}.")
    method = PAPER_METHOD if method is None else method
    rate = _PAPER_RATES.get(parse_method(method).importance, _PAPER_RATES["wanda"])
    return {
        "method": method,
        "pattern": "2:4",
        "block_size": 64,
        "dataset": "c4",
        "sampling": "document",
        "num_samples": 132,  # 128 to learn from, 4 to choose the best step
        "sequence_length": 1024,
        "learning": {
            "layers": "all",
            "scope": "model",
            "steps": 400,
            "windows_per_step": 16,
            "learning_rate": _PAPER_SCALE * rate,
            "weight_decay": 0.1 / _PAPER_SCALE,  # per step, decay is rate times this
            "initial": "random",
            "initial_logit": 1.0,
            "temperature_start": 1.0,
            "temperature_end": 0.1,
            "sinkhorn_iterations": 5,
            "patience": 0,
        },
    }
