"""The vLLM versions that the plugin was tested with; told without importing vLLM."""

from packaging.specifiers import SpecifierSet

VLLM = SpecifierSet(">=0.32,<0.35")
