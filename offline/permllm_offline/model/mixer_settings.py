"""Settings of Mamba layers that engines do not read: refused, or set aside."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from permllm_offline.errors import OfflineError


def check_mixers(config: Any) -> None:
    """Raise OfflineError for Mamba layers that vLLM computes in another way than Transformers."""
    limit = getattr(config, "time_step_limit", None)
    if limit is not None and tuple(limit) != (0, math.inf):
        raise OfflineError(
            f"time_step_limit is {tuple(limit)}, which vLLM does not read: give a model with none, "
            "or with (0, Infinity)."
        )
    normed = getattr(config, "mamba_rms_norm", False)
    if normed and getattr(config, "mamba_norm_before_gate", False):
        raise OfflineError(
            "mamba_norm_before_gate is True, which Transformers reads and vLLM does not: give a "
            "model whose Mamba layers have the gate before the norm, or no norm."
        )


def take_any_step(model: nn.Module) -> None:
    """Let the Mamba layers of a model take steps of any size, as engines do.

    Transformers 5.19 lets those of Nemotron-H take none below ``time_step_min``, which is where
    training began; of other families a configuration that bounds them is refused.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
