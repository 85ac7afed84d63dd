"""Repairs of what vLLM and torch get wrong on CPUs, one file each.

Each says what the defect is, where it is reported or stands, and which versions it is for;
`tests/vllm_workarounds` has a test of each that fails once the defect is gone. They are installed
by `quantization/model_loader.py`, for sparse models alone.
"""
