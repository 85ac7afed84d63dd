"""The kinds of reconstruction that a method can name."""

from __future__ import annotations

from collections.abc import Mapping

from permllm_offline.errors import OfflineError
from permllm_offline.reconstruction.blockwise import (
    choose_and_tune,
    tune_kept_weights,
    update_and_tune,
)
from permllm_offline.reconstruction.distillation import distil
from permllm_offline.reconstruction.layer_work import Reconstruction
from permllm_offline.reconstruction.obs import choose_and_update, update_kept_weights

RECONSTRUCTIONS: Mapping[str, Reconstruction] = {
    "none": Reconstruction("kept weights stay as they are"),
    "obs": Reconstruction(
        "kept weights take over what pruned ones did, column by column",
        layer=update_kept_weights,
        updates=True,
    ),
    "sparsegpt": Reconstruction(
        "obs that also chooses the masks anew",
        layer=choose_and_update,
        updates=True,
        chosen_masks=True,
    ),
    "blockwise": Reconstruction(
        "kept weights of each decoder layer tuned until it answers like the dense one",
        layer=tune_kept_weights,
        tunes=True,
        seeded=True,
    ),
    "obs+blockwise": Reconstruction(
        "obs, then blockwise", layer=update_and_tune, updates=True, tunes=True, seeded=True
    ),
    "sparsegpt+blockwise": Reconstruction(
        "sparsegpt, then blockwise",
        layer=choose_and_tune,
        updates=True,
        chosen_masks=True,
        tunes=True,
        seeded=True,
    ),
    "distillation": Reconstruction(
        "all kept weights tuned together until the model answers like the dense one",
        model=distil,
        needs_hidden_states=True,
        seeded=True,
    ),
    "obs+distillation": Reconstruction(
        "obs, then distillation",
        layer=update_kept_weights,
        model=distil,
        updates=True,
        needs_hidden_states=True,
        seeded=True,
    ),
}


def find_reconstruction(name: object) -> Reconstruction:
    """Return a kind of reconstruction by name; raises OfflineError that lists the known ones."""
    if not isinstance(name, str) or name not in RECONSTRUCTIONS:
        raise OfflineError(
            f"reconstruction {name!r} is not known: give one of {', '.join(RECONSTRUCTIONS)}."
        )
    return RECONSTRUCTIONS[name]
