"""The method of a row by its name: METHOD[/RECONSTRUCTION][@VARIANT]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from permllm_offline.preparation.method_parts import MethodParts, find_parts
from permllm_offline.recipe.methods import METHODS
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS

VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "last:6": {"learning": {"layers": "last:6"}},
    "no-self-windows": {"distillation": {"self_windows": 0}},
    "no-smoothing": {"smoothing": False},
    "converted": {},
    "converted-without-text": {},
}
"""Entries of the recipe that differ from the method's defaults."""

CONVERTED: Mapping[str, bool] = {"converted": True, "converted-without-text": False}
"""Variants that `convert` rounds after the prune, and whether it reads calibration text."""


@dataclass(frozen=True)
class NamedMethod:
    """A method, with a reconstruction in place of its own and a variant, or with neither."""

    method: str
    reconstruction: str | None
    variant: str | None

    @classmethod
    def parse(cls, name: str) -> NamedMethod:
        """Take a name apart.

        Raises:
            ValueError: something in it is not known, or its method does not read the variant.
        """
        rest, at, variant = name.partition("@")
        method, slash, reconstruction = rest.partition("/")
        known = method in METHODS and (not slash or reconstruction in RECONSTRUCTIONS)
        if not known or (at and variant not in VARIANTS):
            raise ValueError(
                f"{name!r}: give METHOD or METHOD/RECONSTRUCTION, either with or without @VARIANT, "
                f"with a method of {', '.join(METHODS)}, a reconstruction of "
                f"{', '.join(RECONSTRUCTIONS)} and a variant of {', '.join(VARIANTS)}"
            )
        found = cls(method, reconstruction or None, variant or None)
        if at and not set(VARIANTS[variant]) <= found._read():
            raise ValueError(
                f"{name!r}: {rest} does not read the entries of @{variant}, {VARIANTS[variant]}; "
                "give a method that learns its permutation, or distils, as they need it"
            )
        return found

    @property
    def pruned(self) -> str:
        """The name of the same without its variant."""
        return "/".join(filter(None, (self.method, self.reconstruction)))

    @property
    def learned(self) -> bool:
        """Whether the permutation is learned."""
        return self._parts.permutation.learns

    @property
    def seeded(self) -> bool:
        """Whether the result depends on the seed beyond the choice of windows."""
        return self.learned or self._parts.reconstruction.seeded

    @property
    def servable(self) -> bool:
        """Whether a checkpoint can hold the method's permutation."""
        return not self._parts.permutation.across_blocks

    def may_have(self, values: str) -> bool:
        """Whether a row may be of these values: what is converted is of integers alone."""
        return self.variant not in CONVERTED if values == "bfloat16" else self.servable

    def entries(self) -> dict[str, Any]:
        """Entries of the recipe."""
        variant = VARIANTS[self.variant] if self.variant else {}
        return {"method": self.method, "reconstruction": self.reconstruction, **variant}

    @property
    def _parts(self) -> MethodParts:
        return find_parts(self.method, self.reconstruction)

    def _read(self) -> set[str]:
        distils = self._parts.reconstruction.distils
        reads = {"learning": self.learned, "distillation": distils, "smoothing": True}
        return {entries for entries, read in reads.items() if read}
