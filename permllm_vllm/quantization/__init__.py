"""The quantization method `permllm` in vLLM's vocabulary."""
