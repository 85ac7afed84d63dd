"""The same checkpoint in Hugging Face Transformers, active once this package is imported.

    import permllm_vllm.hf
    model = AutoModelForCausalLM.from_pretrained("./sparse", dtype="auto")

Transformers finds quantization methods in tables that a program fills; importing this package
fills in `permllm`. It has no entry point that would do so by itself.
"""

from permllm_vllm.hf.config import PermLLMConfig
from permllm_vllm.hf.linear import SparseLinear
from permllm_vllm.hf.quantizer import PermLLMQuantizer

__all__ = ["PermLLMConfig", "PermLLMQuantizer", "SparseLinear"]
