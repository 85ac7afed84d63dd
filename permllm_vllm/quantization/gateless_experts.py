"""Experts without a gate on CPUs, which vLLM refuses there before it asks who multiplies them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from permllm_vllm.compat import FusedMoEConfig, UnquantizedFusedMoEMethod


@contextmanager
def gateless_experts_accepted() -> Iterator[None]:
    """Let models with such experts be built, as vLLM does on GPUs.

    Its refusal is the last thing that a configuration of experts does (vLLM 0.32).
    """
    original = FusedMoEConfig.__post_init__

    def finish(config: Any) -> None:
        try:
            original(config)
        except NotImplementedError:
            if config.is_act_and_mul:
                raise

    FusedMoEConfig.__post_init__ = finish
    try:
        yield
    finally:
        FusedMoEConfig.__post_init__ = original


def dense_experts_method(moe_config: Any, prefix: str, reason: str) -> Any:
    """vLLM's own method, for dense experts; raises NotImplementedError where it has none.

    `reason` says why they are multiplied dense, and what to do for them to be sparse.
    """
    if not moe_config.is_act_and_mul and moe_config.device.type == "cpu":
        raise NotImplementedError(
            f"the experts of {prefix} have no gate, and vLLM multiplies such experts dense on GPUs "
            f"alone; here {reason}."
        )
    return UnquantizedFusedMoEMethod(moe_config)
