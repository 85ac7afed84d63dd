"""The files that vLLM is about to read weights from, checked before its own loader opens them."""

from glob import glob
from pathlib import Path

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import INDEX_NAME, read_headers, read_weight_map
from permllm_vllm.compat import get_current_vllm_config_or_none

WEIGHT_FILES = ("safetensors", "bin", "pt", "pth")
"""Endings of what vLLM's own loader may read weights from."""
SHARDED_STATES = ("sharded_state", "runai_streamer_sharded")
"""vLLM's formats of a model that it has loaded and written."""
SHARDED_STATE_FILES = "model-*-part-*.safetensors"
"""Files of such a model, unless a pattern of the user's own names them."""


def require_safetensors(directory: Path) -> list[str]:
    """Raise CheckpointError unless what weights there are lie in whole safetensors files of it.

    vLLM's loader takes every `*.safetensors` there is, follows links, and unpickles `*.bin` where
    there is none: so what the index does not name is checked too. Only headers are read.

    vLLM does not say yet how it will load; a model that it wrote itself is known by its files.

    A directory without any weight file passes, with an index or without: other loaders stream the
    weights from elsewhere (`s3://`, tensorizer), and vLLM's own says that it finds none.

    Returns:
        The names of all tensors, as far as the directory says.
    """
    if not any(glob(f"*.{ending}", root_dir=directory) for ending in WEIGHT_FILES):
        return sorted(read_weight_map(directory)) if (directory / INDEX_NAME).exists() else []
    written = sorted(glob(SHARDED_STATE_FILES, root_dir=directory))
    if written and not (directory / INDEX_NAME).exists():
        raise _sharded_state(str(directory / written[0]))
    found = glob("*.safetensors", root_dir=directory)  # as vLLM looks: nothing hidden
    files = sorted({*read_weight_map(directory).values(), *found})
    return sorted({name for file in files for name in read_headers(directory / file)})


def refuse_load_format() -> None:
    """Raise CheckpointError where vLLM is to read no checkpoint: `--load-format dummy`, and others.

    They make weights up, or read those of a model that vLLM has loaded before.
    """
    load_config = getattr(get_current_vllm_config_or_none(), "load_config", None)
    load_format = getattr(load_config, "load_format", None)
    if load_format == "dummy":
        raise CheckpointError(
            "--load-format dummy fills weights with random numbers, but masks and permutations of "
            "sparse layers must obey the format. Load the checkpoint's own weights, or make random "
            "ones of the same shape with `python -m benchmarks.models`."
        )
    if load_format in SHARDED_STATES:
        raise _sharded_state(f"--load-format {load_format}")


def _sharded_state(what: str) -> CheckpointError:
    return CheckpointError(
        f"{what} is read as vLLM's state of a packed model, but sparse layers are packed anew for "
        "each processor, from the tensors of their checkpoint alone. Serve the directory that "
        "`permllm-offline prune` wrote, without --load-format."
    )
