"""Quantized models: which are read as dense ones, and what is said of the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.scaled_form import (
    BITMASK,
    DENSE,
    MARLIN,
    ScaledForm,
    scaled_form,
    sparse_layout,
)
from permllm_vllm.checkpoint.schema import is_of_this_format


def dense_form(name: str, config: Mapping[str, Any], layout: str = DENSE) -> ScaledForm | None:
    """Return the form of the 8 bits in which a model is stored; None of other models that are read.

    These are plain ones, and permllm checkpoints.

    Args:
        name: of the model, for the message.
        config: what its ``config.json`` says.
        layout: of its zeros, which the caller undoes.

    Raises:
        OfflineError: the model is quantized in another form.
    """
    try:
        found = sparse_layout(config)
        if layout == DENSE and found in (BITMASK, MARLIN):
            raise OfflineError(
                f"{name!r} is pruned to 2:4 already, and stored as {found!r}: make it a checkpoint "
                "of this format by `permllm-offline convert`."
            )
        return scaled_form(config, layout)
    except CheckpointError as error:
        raise OfflineError(f"{name!r} is quantized in a form that is not read: {error}.") from error


def require_read(name: str, config: Mapping[str, Any]) -> None:
    """Raise OfflineError for a model that ``dense_form`` refuses; arguments as there."""
    dense_form(name, config)


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
