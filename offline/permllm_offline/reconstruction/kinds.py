"""The kinds of reconstruction that a method can name."""

from __future__ import annotations

from collections.abc import Mapping

from permllm_offline.errors import OfflineError
from permllm_offline.reconstruction.blockwise import tune_kept_weights
from permllm_offline.reconstruction.distillation import distil
from permllm_offline.reconstruction.layer_work import Reconstruction
from permllm_offline.reconstruction.obs import choose_and_update, update_kept_weights

RECONSTRUCTIONS: Mapping[str, Reconstruction] = {
    "none": Reconstruction("kept weights stay as they are"),
    "obs": Reconstruction(
        "kept weights take over what pruned ones did, column by column", update=update_kept_weights
    ),
    "sparsegpt": Reconstruction(
        "obs that also chooses the masks anew", update=choose_and_update, chosen_masks=True
    ),
    "blockwise": Reconstruction(
        "kept weights of each decoder layer tuned until it answers like the dense one",
        tune=tune_kept_weights,
    ),
    "obs+blockwise": Reconstruction(
        "obs, then blockwise", update=update_kept_weights, tune=tune_kept_weights
    ),
    "sparsegpt+blockwise": Reconstruction(
        "sparsegpt, then blockwise",
        update=choose_and_update,
        tune=tune_kept_weights,
        chosen_masks=True,
    ),
    "distillation": Reconstruction(
        "all kept weights tuned together until the model answers like the dense one", model=distil
    ),
    "obs+distillation": Reconstruction(
        "obs, then distillation", update=update_kept_weights, model=distil
    ),
}


def find_reconstruction(name: object) -> Reconstruction:
    """Return a kind of reconstruction by name; raises OfflineError that lists the known ones."""
    if not isinstance(name, str) or name not in RECONSTRUCTIONS:
        raise OfflineError(
            f"reconstruction {name!r} is not known: give one of {', '.join(RECONSTRUCTIONS)}."
        )
    return RECONSTRUCTIONS[name]
