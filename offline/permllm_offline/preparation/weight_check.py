"""Whether a checkpoint stores what a prune will read, told by its headers before any work."""

from __future__ import annotations

from permllm_offline.errors import OfflineError
from permllm_offline.preparation.prepared import Prepared


def check_weights(prepared: Prepared) -> None:
    """Look at the headers of all tensors: what is to be pruned is there, and all can be read.

    Raises:
        OfflineError: a weight that is stored by another name or of other sizes, or of a decoder
            layer that the model does not have.
        CheckpointError: files that are not whole, or weights of 8 bits.
    """
    reader = prepared.source.reader()
    for linear in prepared.plan.linears:
        name, sizes = f"{linear.name}.weight", (linear.out_features, linear.layout.in_features)
        if name not in reader:
            raise OfflineError(
                f"{prepared.source.name!r} stores no {linear.name}.weight, which the loaded model "
                "has: it names its tensors in an older way, keeps all experts of a layer in one "
                "of another form, or holds no safetensors of this architecture. Load it with "
                "transformers, `save_pretrained` it, and prune that."
            )
        if (found := reader.header(name).shape) != sizes:
            raise OfflineError(
                f"{prepared.source.name!r} stores {list(found)} as {name}, its config.json asks "
                f"for {list(sizes)}: fetch the model again or, where its experts are stored "
                "together, load it with transformers, `save_pretrained` it, and prune that."
            )
    names, layers = prepared.source.language.names, len(prepared.plan.layers)
    for name in reader.names():
        reader.header(name)
        own = names.own(name)
        if own is not None and _layer(own, prepared.plan.family.layers) >= layers:
            raise OfflineError(
                f"{prepared.source.name!r} stores {name}, but its config.json has {layers} decoder "
                "layers. To prune a part of a model, load that part with "
                "transformers, `save_pretrained` it, and prune what was saved."
            )


def _layer(name: str, layers: str) -> int:
    """The number of the decoder layer that a tensor belongs to, -1 for those outside."""
    number = name.removeprefix(f"{layers}.").partition(".")[0]
    return int(number) if name.startswith(f"{layers}.") and number.isdecimal() else -1
