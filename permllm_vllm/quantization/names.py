"""From vLLM's names of modules to those of the checkpoint."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

DRAFT_MODEL = "draft_model."
"""What vLLM puts before every name of a model that drafts for another (speculative decoding)."""

Naming = Callable[[str, Any], str]
"""What vLLM calls a module while it builds it, and the configuration -> its name in the model."""


def _of_granite(prefix: str, config: Any) -> str:
    return prefix.replace(".mixer.", ".mamba.")


def _of_lfm2_vl(prefix: str, config: Any) -> str:
    return prefix.replace("language.", "language_model.")


def _of_falcon_h1(prefix: str, config: Any) -> str:
    mixer = re.fullmatch(r"(?:.*\.)?(\d+)\.mixer\.(\w+)", prefix)
    if mixer is not None:  # numbered after the attention of all layers, in no module
        layer = int(mixer[1]) - config.num_hidden_layers
        return f"model.layers.{layer}.mamba.mamba.{mixer[2]}"
    return re.sub(r"(\.layers\.\d+)\.(qkv|o)_proj$", r"\1.self_attn.\2_proj", prefix)


def _of_minimax_m2(prefix: str, config: Any) -> str:
    return prefix.replace(".mlp.", ".block_sparse_moe.")


def _of_ernie(prefix: str, config: Any) -> str:
    layer = re.fullmatch(r"(.*\blayers)\.(\d+)\.(.+)", prefix)
    drafting = -1 if layer is None else int(layer[2]) - config.num_hidden_layers
    if layer is None or drafting < 0:
        return prefix
    return f"{layer[1].removesuffix('layers')}mtp_block.{drafting}.{layer[3]}"


NAMINGS: Mapping[str, Naming] = {
    "granitemoehybrid": _of_granite,
    "ernie4_5_moe": _of_ernie,
    "ernie_mtp": _of_ernie,  # its drafting layers
    "lfm2_vl": _of_lfm2_vl,
    "falcon_h1": _of_falcon_h1,
    "minimax_m2": _of_minimax_m2,
}
"""By `model_type`, where the two are not the same."""


def checkpoint_name(prefix: str) -> str:
    """The name of a vLLM layer without what only distinguishes several models of one engine."""
    return prefix.removeprefix(DRAFT_MODEL)


def original_names(module: str, mappers: Sequence[Any]) -> list[str]:
    """The name itself, and every name that the mappers, first to last, turn into it.

    `mappers` are vLLM's `WeightsMapper`s. Prefixes, suffixes and parts that they replace are put
    back; a guess counts only if the mapper takes it to `module` again.
    """
    names = [module]
    for mapper in reversed(mappers):
        names += [
            guess
            for name in names
            for guess in _guesses(name, mapper)
            if guess not in names and mapper.apply_list([guess]) == [name]
        ]
    return names


def _guesses(name: str, mapper: Any) -> Iterator[str]:
    """Names that could become `name`, with at most one replacement of each kind."""
    guesses = [name]
    for new, old in _replacements(mapper.orig_to_new_suffix):
        guesses += [guess.removesuffix(new) + old for guess in guesses if guess.endswith(new)]
    for new, old in _replacements(mapper.orig_to_new_prefix):
        guesses += [old + guess.removeprefix(new) for guess in guesses if guess.startswith(new)]
    for new, old in _replacements(mapper.orig_to_new_substr):
        guesses += [guess.replace(new, old, 1) for guess in guesses if new and new in guess]
    yield from guesses[1:]


def _replacements(mapping: Any) -> list[tuple[str, str]]:
    return [(new, old) for old, new in mapping.items() if new is not None]
