"""The family of a configuration, with what that says of its experts and of single layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.model.agreed_settings import check_agreed
from permllm_offline.model.common_groups import Groups, in_some_layers, mlp
from permllm_offline.model.expert_settings import (
    EXPERT_COUNTS,
    check_gate,
    experts_in,
    experts_taken,
)
from permllm_offline.model.families import (
    FAMILIES,
    QKV,
    QUERIES_AT_ONCE,
    QUERIES_IN_STEPS,
    SAME_ON_TEXT,
    WRAPPINGS,
)
from permllm_offline.model.family import Family, SharedInputGroup
from permllm_offline.model.heads import (
    layers_that_hand_on,
    layers_that_share,
    layers_with_keys_as_values,
)
from permllm_offline.model.mixer_settings import check_mixers


def inner_family(config: Any) -> str | None:
    """Name in ``FAMILIES`` of the language model inside a configuration; None where it has none."""
    model_type = str(getattr(getattr(config, "text_config", None), "model_type", None))
    name = SAME_ON_TEXT.get(model_type, model_type)
    return name if name in FAMILIES and FAMILIES[name].layers == "model.layers" else None


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    Raises:
        OfflineError: its ``model_type`` is not in the table, or it has experts or Mamba layers of
            another form, or settings that engines read otherwise.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise OfflineError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}. {_remedy(config)}"
        )
    check_mixers(config)
    check_agreed(config)
    family = FAMILIES[model_type]
    family = replace(family, groups=_with_its_queries(family.groups, config))
    if family.handed_on:
        family = replace(
            family,
            read_by_others=layers_that_hand_on(config),
            sharing=bool(layers_that_share(config)),
            lacks=_lacks(config),
        )
    if family.experts and (count := experts_in(config)):
        if len(family.expert_linears) == 3:
            check_gate(config)
        experts = _experts_of(family, count, experts_taken(config) / count)
        return replace(family, groups=family.groups + experts)
    if family.experts:  # beside an MLP that is always there
        return replace(family, experts="")
    for name in EXPERT_COUNTS:
        count = getattr(config, name, None) or 0
        if count:
            mixtures = ", ".join(sorted(known for known, one in FAMILIES.items() if one.experts))
            raise OfflineError(
                f"the model has {count} experts ({name}), and of the mixtures of experts only "
                f"{mixtures} are supported: give one of these, or a model of {model_type!r} "
                "without experts."
            )
    return family


def _experts_of(family: Family, count: int, share: float) -> Groups:
    """The groups of all experts of a mixture; each has permutations of its own."""
    found: list[SharedInputGroup] = []
    for number in range(count):
        expert = f"{family.experts}.{number}"
        first, down = mlp(expert, f"{expert}.", family.expert_linears)
        found += [replace(first, reads_whole=True), down]
    return in_some_layers(*(replace(one, experts=family.experts, share=share) for one in found))


def _with_its_queries(groups: Groups, config: Any) -> Groups:
    """Leave out the other of two ways to the queries of latent attention, in one step or two."""
    in_steps = getattr(config, "q_lora_rank", None) is not None
    others = (QUERIES_AT_ONCE,) if in_steps else QUERIES_IN_STEPS
    return tuple(one for one in groups if one not in others)


def _lacks(config: Any) -> dict[int, frozenset[str]]:
    """What some decoder layers do not have: keys and values of their own, or these alone."""
    without_values = dict.fromkeys(layers_with_keys_as_values(config), frozenset(QKV[2:]))
    return without_values | dict.fromkeys(layers_that_share(config), frozenset(QKV[1:]))


def _remedy(config: Any) -> str:
    if inner_family(config) is not None:
        return (
            f"Its language model, of model_type {config.text_config.model_type!r}, is, but the "
            f"checkpoint has it under none of the names {', '.join(name for name, _ in WRAPPINGS)}:"
            " load it with transformers, `save_pretrained` it, and prune that."
        )
    return (
        "Prune a model of one of these. CONTRIBUTING.md says how a family is added: if its layers "
        "have the form of these, by an entry of FAMILIES and a test."
    )
