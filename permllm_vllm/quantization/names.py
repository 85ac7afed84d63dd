"""From vLLM's names of modules to those of the checkpoint."""

from collections.abc import Iterator, Sequence
from typing import Any

DRAFT_MODEL = "draft_model."
"""What vLLM puts before every name of a model that drafts for another (speculative decoding)."""


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
