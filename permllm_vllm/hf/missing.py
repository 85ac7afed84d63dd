"""Dense parameters of a model that neither its checkpoint nor a tie would fill."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.hf.linear import SparseLinear


def missing_parameters(model: Any, stored: Set[str]) -> Iterator[Problem]:
    """Report what Transformers would fill with ones or random numbers, and only warn about.

    A class that config.json does not name may bring a head of its own, new on purpose; whatever is
    inside the base model is never new.

    Args:
        model: with its sparse layers in place; their tensors are checked elsewhere.
        stored: names of the checkpoint's tensors.
    """
    stored = stored | _loaded_names(model, stored)
    prefix = getattr(model, "base_model_prefix", "")
    whole = model.base_model is model or type(model).__name__ in (model.config.architectures or ())
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    new = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for name in _dense_parameters(model):
        if not (whole or name.startswith(f"{prefix}.")):
            continue
        if any(pattern.search(name) for pattern in new):
            continue
        source = ties.get(name, name)
        names = {name, source, *(other for other, its in ties.items() if its == source)}
        if names.isdisjoint(stored) and stored.isdisjoint(f"{prefix}.{n}" for n in names):
            rule = f"{type(model).__name__} has it, and config.json ties it to nothing stored"
            yield Problem(name, "nothing", rule, FETCH_AGAIN)


def _loaded_names(model: Any, stored: Set[str]) -> Set[str]:
    """What Transformers renames, merges or splits stored tensors to, such as those of experts."""
    transforms = get_model_conversion_mapping(model)
    found = set()
    for name in stored:
        for transform in transforms:
            renamed, matched = transform.rename_source_key(name)
            if matched is not None:  # what is split is named after the first part
                first, *others = transform.target_patterns
                found |= {renamed.replace(first, other) for other in others}
            name = renamed
        found.add(name)
    return found


def _dense_parameters(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if not isinstance(module, SparseLinear):
            for kind, _ in module.named_parameters(recurse=False):
                yield f"{path}.{kind}" if path else kind
