"""From vLLM's older names of experts' parameters to those that they have."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from torch.nn import Module

REMAP = "maybe_remap_moe_expert_param_name"
"""vLLM's function for that, under the name by which modules of models import it."""
_OLD, _NEW = ".experts.", ".experts.routed_experts."


@contextmanager
def parameters_of_every_kind(model: Module) -> Iterator[None]:
    """Let a model find all parameters of its experts while it loads.

    vLLM 0.32 gives new names to kinds of parameters that it has a list of, without permutations,
    and models that ask it (Granite 4) look for the others in vain.
    """
    names = {base.__module__ for one in model.modules() for base in type(one).__mro__}
    with ExitStack() as patches:
        for module in map(sys.modules.get, names):
            if (original := getattr(module, REMAP, None)) is not None:
                patches.enter_context(patch.object(module, REMAP, _any_kind(original)))
        yield


def _any_kind(original: Any) -> Any:
    def remap(name: str, params_dict: Mapping[str, Any]) -> str:
        found = name.replace(_OLD, _NEW, 1)
        renamed: str = found if found in params_dict else original(name, params_dict)
        return renamed

    return remap
