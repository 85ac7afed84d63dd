"""`quantization_config` of a checkpoint, as Transformers wants to hold it."""

from __future__ import annotations

from typing import Any

from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from permllm_vllm.checkpoint import schema


@register_quantization_config(schema.QUANT_METHOD)
class PermLLMConfig(QuantizationConfigMixin):
    """Wraps the format's own `QuantizationConfig`, and writes it back as it was read.

    Raises `CheckpointError` that lists every unknown key, missing key and unsupported version.
    """

    def __init__(self, **entries: Any) -> None:
        self.quant_method = schema.QUANT_METHOD
        self.checkpoint = schema.QuantizationConfig.from_dict(entries)

    def to_dict(self) -> dict[str, Any]:
        """Return what belongs into `config.json`."""
        return self.checkpoint.to_dict()
