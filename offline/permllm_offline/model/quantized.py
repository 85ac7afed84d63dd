"""Models whose weights are quantized: refused, with what makes dense ones of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.schema import is_of_this_format
from permllm_vllm.checkpoint.stored_otherwise import require_plain


def require_read(name: str, config: Mapping[str, Any]) -> None:
    """Raise OfflineError for a model that is neither plain numbers nor a permllm checkpoint.

    Args:
        name: of the model, for the message.
        config: what its ``config.json`` says.
    """
    try:
        require_plain(config)
    except CheckpointError as error:
        raise OfflineError(f"{name!r} is stored in a form that is not read: {error}.") from error


def require_dense(name: str, config: Mapping[str, Any], verb: str) -> None:
    """Raise OfflineError for a permllm checkpoint, and for other models that are not dense.

    Args:
        name: of the model.
        config: what its ``config.json`` says.
        verb: what shall be done with it.
    """
    if is_of_this_format(config):
        raise OfflineError(
            f"{name!r} is already quantized or pruned: {verb} its dense original. (What is pruned "
            "becomes int8 by `permllm-offline convert --values int8`.)"
        )
    require_read(name, config)
