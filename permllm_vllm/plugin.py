"""vLLM's entry point (`vllm.general_plugins`)."""

import logging


def register() -> None:
    """Register the quantization method `permllm` with vLLM.

    vLLM calls this in every process it starts, before it knows which model will be served, and an
    exception here would stop it for every model: whatever goes wrong is logged and vLLM goes on
    without the method. Calling it again does nothing.
    """
    try:
        from permllm_vllm.quantization import config  # noqa: F401  (registers on import)
    except Exception as error:
        logging.getLogger("vllm.permllm").warning(
            "PermLLM could not be registered, checkpoints with quant_method 'permllm' cannot be "
            "served (everything else can): %s: %s",
            type(error).__name__,
            error,
        )
