"""vLLM's entry point (`vllm.general_plugins`)."""

import importlib
import logging
from contextlib import suppress
from typing import Any

QUANT_METHOD = "permllm"
_VLLM_QUANTIZATION = "vllm.model_executor.layers.quantization"


def register() -> None:
    """Register the quantization method `permllm` with vLLM.

    vLLM calls this in every process it starts, before it knows which model will be served, and an
    exception here would stop it for every model: whatever goes wrong is logged, vLLM goes on, and
    who serves a PermLLM checkpoint is told the reason. Calling it again does nothing.
    """
    try:
        from permllm_vllm.quantization import config, model_loader  # noqa: F401
        # The first registers the method when it is imported.

        model_loader.install()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        logging.getLogger("vllm.permllm").warning(
            "PermLLM could not be registered, checkpoints with quant_method 'permllm' cannot be "
            "served (everything else can): %s",
            reason,
        )
        with suppress(Exception):  # then vLLM says that it does not know the method
            _register_refusal(reason)


def _register_refusal(reason: str) -> None:
    """Register a method of the same name that can do nothing but say why.

    Looks vLLM up by itself: `compat` may be what could not be imported.
    """
    quantization = importlib.import_module(_VLLM_QUANTIZATION)
    base: Any = importlib.import_module(f"{_VLLM_QUANTIZATION}.base_config").QuantizationConfig

    class UnavailablePermLLMConfig(base):
        @classmethod
        def from_config(cls, config: dict[str, Any]) -> None:
            raise ImportError(f"PermLLM could not be registered with this vLLM: {reason}")

    quantization.register_quantization_config(QUANT_METHOD)(UnavailablePermLLMConfig)
