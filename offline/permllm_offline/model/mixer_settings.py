"""Where Mamba layers of Transformers differ from those of engines: refused, or set aside."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

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


def compute_as_engines(model: nn.Module) -> None:
    """Let the Mamba layers of a model compute what engines do.

    In Transformers 5.19, those of Nemotron-H take no step below ``time_step_min``, which is where
    training began (of other families a configuration that bounds them is refused). The gated norm
    of Falcon-H1 drops the dimension of tokens where there is one, so that with a cache every
    sequence would be added to every other.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, math.inf)
        if hasattr(module, "norm_before_gate"):
            module.register_forward_hook(_in_shape_of_input)


def _in_shape_of_input(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.view(inputs[0].shape)
