"""The files that vLLM is about to read weights from, checked before its own loader opens them."""

from glob import glob
from pathlib import Path

from permllm_vllm.checkpoint.shards import read_headers, read_weight_map


def require_safetensors(directory: Path) -> None:
    """Raise CheckpointError unless all weights are in whole safetensors files of this directory.

    vLLM's loader takes every `*.safetensors` there is, follows links, and unpickles `*.bin` where
    there is none: so what the index does not name is checked too. Only headers are read.
    """
    found = glob("*.safetensors", root_dir=directory)  # as vLLM looks: nothing hidden
    for file in sorted({*read_weight_map(directory).values(), *found}):
        read_headers(directory / file)
