"""The family of a configuration, with what that says of its experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.model.common_groups import Groups, in_some_layers, mlp
from permllm_offline.model.families import FAMILIES, SAME_ON_TEXT, WRAPPINGS
from permllm_offline.model.family import Family, SharedInputGroup

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names that configurations have for the number of experts of a layer."""
_GATE = "silu"
"""What the kernel of experts does with a gate, by Transformers' name."""


def inner_family(config: Any) -> str | None:
    """Name in ``FAMILIES`` of the language model inside a configuration; None where it has none."""
    model_type = str(getattr(getattr(config, "text_config", None), "model_type", None))
    name = SAME_ON_TEXT.get(model_type, model_type)
    return name if name in FAMILIES and FAMILIES[name].layers == "model.layers" else None


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    Raises:
        OfflineError: its ``model_type`` is not in the table, or it has experts of another form.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise OfflineError(
            f"model_type {model_type!r} is not supported: the table of model families has "
            f"{', '.join(sorted(FAMILIES))}. {_remedy(config)}"
        )
    family = FAMILIES[model_type]
    name, count = _experts_in(config)
    if family.experts:
        activation = getattr(config, "hidden_act", _GATE)
        if activation != _GATE:
            raise OfflineError(
                f"hidden_act is {activation!r}, but sparse experts are served with {_GATE!r} "
                "alone: give a mixture with that."
            )
        experts = _experts_of(family, count, config.num_experts_per_tok / count)
        return replace(family, groups=family.groups + experts)
    if count:
        mixtures = ", ".join(sorted(known for known, one in FAMILIES.items() if one.experts))
        raise OfflineError(
            f"the model has {count} experts ({name}), and of the mixtures of experts only "
            f"{mixtures} are supported: give one of these, or a model of {model_type!r} "
            "without experts."
        )
    return family


def _experts_in(config: Any) -> tuple[str, int]:
    """What a configuration calls the number of experts of a layer, and that; 0 where none are."""
    named = ((name, getattr(config, name, None)) for name in _EXPERT_COUNTS)
    return next(((name, int(count)) for name, count in named if count), ("", 0))


def _experts_of(family: Family, count: int, share: float) -> Groups:
    """The groups of all experts of a mixture; each has permutations of its own."""
    found: list[SharedInputGroup] = []
    for number in range(count):
        expert = f"{family.experts}.{number}"
        first, down = mlp(expert, f"{expert}.", family.expert_linears)
        found += [replace(first, reads_whole=True), down]
    return in_some_layers(*(replace(one, experts=family.experts, share=share) for one in found))


def _remedy(config: Any) -> str:
    if inner_family(config) is not None:
        return (
            f"Its language model, of model_type {config.text_config.model_type!r}, is, but the "
            f"checkpoint has it under none of the names {', '.join(name for name, _ in WRAPPINGS)}:"
            " load it with transformers, `save_pretrained` it, and prune that."
        )
    return (
        "Prune a model of one of these; or, if its layers have the form of these, add an entry to "
        "FAMILIES in permllm_offline/model/families.py, as CONTRIBUTING.md says."
    )
