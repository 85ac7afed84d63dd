"""The files that vLLM is about to read weights from, checked before its own loader opens them."""

from glob import glob
from pathlib import Path

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import read_headers, read_weight_map
from permllm_vllm.compat import get_current_vllm_config_or_none


def require_safetensors(directory: Path) -> None:
    """Raise CheckpointError unless all weights are in whole safetensors files of this directory.

    vLLM's loader takes every `*.safetensors` there is, follows links, and unpickles `*.bin` where
    there is none: so what the index does not name is checked too. Only headers are read.
    """
    found = glob("*.safetensors", root_dir=directory)  # as vLLM looks: nothing hidden
    for file in sorted({*read_weight_map(directory).values(), *found}):
        read_headers(directory / file)


def refuse_dummy_weights() -> None:
    """Raise CheckpointError where vLLM is to make weights up (`--load-format dummy`)."""
    load_config = getattr(get_current_vllm_config_or_none(), "load_config", None)
    if getattr(load_config, "load_format", None) == "dummy":
        raise CheckpointError(
            "--load-format dummy fills weights with random numbers, but masks and permutations of "
            "sparse layers must obey the format. Load the checkpoint's own weights, or make random "
            "ones of the same shape with `python -m benchmarks.models`."
        )
