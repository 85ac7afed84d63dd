"""Serves N:M sparse models with learned channel permutations in vLLM.

Importing this package imports neither vLLM nor pydantic: the checkpoint format is in
`permllm_vllm.checkpoint`, the kernels in `permllm_vllm.ops` and `permllm_vllm.backends`, the vLLM
side in `permllm_vllm.plugin` and `permllm_vllm.quantization`.
"""

__version__ = "0.1.0"
