"""From vLLM's older names of experts' parameters to those that they have."""

import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch.nn import Module

REMAP = "maybe_remap_moe_expert_param_name"
"""vLLM's function for that, under the name by which modules of models import it."""
_OLD, _NEW = ".experts.", ".experts.routed_experts."


def find_every_kind(model: Module) -> None:
    """Let a sparse model find all parameters of its experts, whenever it loads.

    vLLM 0.32 gives new names to kinds of parameters that it has a list of, without permutations,
    and models that ask it (Granite 4) look for the others in vain. What it finds by itself stays.
    """
    for name in {base.__module__ for one in model.modules() for base in type(one).__mro__}:
        module = sys.modules.get(name)
        found = getattr(module, REMAP, None)
        if found is not None and getattr(found, "func", None) is not _any_kind:
            setattr(module, REMAP, partial(_any_kind, found))


def _any_kind(original: Any, name: str, params_dict: Mapping[str, Any]) -> str:
    found = name.replace(_OLD, _NEW, 1)
    renamed: str = found if found in params_dict else original(name, params_dict)
    return renamed
