"""The language model inside a model of text and images: its configuration and its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from permllm_offline.model.families import FAMILIES, MORE_TOKENS, WRAPPINGS
from permllm_offline.model.family import Family
from permllm_offline.model.lookup import family_of, inner_family
from permllm_offline.model.renaming import Renamed, own_part, stored_part
from permllm_vllm.checkpoint.headers import natural_order
from permllm_vllm.checkpoint.ignoring import REGEX_PREFIX


@dataclass(frozen=True)
class TensorNames:
    """Prefixes that a language model's tensors have by themselves, and in the checkpoint.

    Inside a decoder layer, whose name begins with ``layers``, parts are ``renamed`` too. A tensor
    of the checkpoint without any of the prefixes belongs to something else, such as a vision tower,
    and so does one of what predicts several tokens.
    """

    prefixes: tuple[tuple[str, str], ...] = (("", ""),)
    layers: str = ""
    renamed: Renamed = ()

    def stored(self, name: str) -> str:
        """Name in the checkpoint of a tensor of the language model."""
        for own, stored in self.prefixes:
            if name.startswith(own):
                return stored + self._with_part(stored_part, name).removeprefix(own)
        return name

    def stored_module(self, name: str) -> str:
        """Name in the checkpoint of a module of the language model."""
        return self.stored(f"{name}.").removesuffix(".")

    def own(self, stored: str) -> str | None:
        """Name in the language model of a tensor of the checkpoint; None where it has none."""
        if stored.startswith(MORE_TOKENS):
            return None
        for own, prefix in self.prefixes:
            if stored.startswith(prefix):
                return self._with_part(own_part, own + stored.removeprefix(prefix))
        return None

    def _with_part(self, rename: Callable[[str, Renamed], str], name: str) -> str:
        """Change what a name has after the number of a decoder layer."""
        if not self.renamed or not name.startswith(self.layers):
            return name
        number, dot, part = name.removeprefix(self.layers).partition(".")
        return f"{self.layers}{number}{dot}{rename(part, self.renamed)}"


@dataclass(frozen=True)
class LanguageModel:
    """A language model: its configuration, the names of its tensors, and what is beside it.

    ``beside`` are the outermost modules of the checkpoint that hold nothing of it: they stay dense.
    """

    config: Any
    names: TensorNames = TensorNames()
    beside: tuple[str, ...] = ()

    @property
    def is_inside(self) -> bool:
        """Whether the checkpoint is one of a model that holds more than this."""
        return self.names.prefixes != _names(self.config.model_type).prefixes

    def family(self) -> Family:
        """Its family, with the names that this checkpoint has for the modules.

        Raises:
            OfflineError: as for ``family_of``.
        """
        family = family_of(self.config)
        ignore = [
            entry if entry.startswith(REGEX_PREFIX) else self.names.stored_module(entry)
            for entry in family.ignore
        ]
        ignore += [rf"{REGEX_PREFIX}{re.escape(one)}\..*" for one in self.beside]
        return replace(
            family,
            stored_layers=self.names.stored_module(family.layers),
            ignore=tuple(dict.fromkeys(ignore)),
        )


def holds_language_model(config: Any) -> bool:
    """Whether a configuration is one of more than a language model, whose own is of a family."""
    return config.model_type not in FAMILIES and inner_family(config) is not None


def may_hold_more(config: Any) -> bool:
    """Whether a checkpoint of a configuration may hold more than a language model."""
    family = FAMILIES.get(config.model_type)
    return (family is not None and bool(family.recurrent)) or holds_language_model(config)


def language_model_of(config: Any, tensors: Collection[str]) -> LanguageModel:
    """Find the language model of a transformers configuration.

    Args:
        config: of a language model, or of one with a tower beside it.
        tensors: names of the checkpoint's tensors.

    Returns:
        The language model inside; ``config`` as it is where that holds none by names that are
        known.
    """
    if not holds_language_model(config):
        names = _names(config.model_type)
        return LanguageModel(config, names, _beside(names, tensors))
    for model, head in WRAPPINGS:
        if any(name.startswith(f"{model}.layers.") for name in tensors):
            prefixes = (("model.", f"{model}."), ("lm_head.", f"{head}."))
            names = replace(_names(inner_family(config)), prefixes=prefixes)
            text = _text_config(config, headless=f"{head}.weight" not in tensors)
            return LanguageModel(text, names, _beside(names, tensors))
    return LanguageModel(config)


def _names(model_type: str | None) -> TensorNames:
    """Names in the checkpoints of a language model, as far as its family says."""
    family = FAMILIES.get(str(model_type))
    if family is None:
        return TensorNames()
    return TensorNames(layers=f"{family.layers}.", renamed=family.renamed)


def _text_config(config: Any, *, headless: bool) -> Any:
    """The inner configuration, with what the outer one says in its place.

    The head is tied where the checkpoint has none and either configuration says so.
    """
    from transformers import AutoConfig

    text, family = deepcopy(config.text_config), inner_family(config)
    if family != text.model_type:
        said = text.to_dict()
        del said["model_type"]
        text = AutoConfig.for_model(family, **said)
    text.dtype = config.dtype or text.dtype
    said_tied = any(getattr(one, "tie_word_embeddings", False) for one in (config, text))
    text.tie_word_embeddings = headless and said_tied
    if getattr(config, "quantization_config", None) is not None:
        text.quantization_config = config.quantization_config
    return text


def _beside(names: TensorNames, tensors: Collection[str]) -> tuple[str, ...]:
    """The outermost modules that hold nothing of the language model."""
    inside = {
        module for tensor in tensors if names.own(tensor) is not None for module in _modules(tensor)
    }
    found = {
        next(module for module in _modules(tensor) if module not in inside)
        for tensor in tensors
        if names.own(tensor) is None
    }
    return tuple(natural_order(found))


def _modules(tensor: str) -> Iterator[str]:
    """The modules around a tensor, the outermost first, and the tensor itself."""
    return accumulate(tensor.split("."), "{}.{}".format)
