"""The tensors that a prune leaves dense: as they are stored, or in a dtype that was asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from permllm_offline.model.skeleton import skeleton_of
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.sparsity.smoothing import divided_by


def left_dense(prepared: Prepared, divided: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield all tensors of a model but those of the linears that are pruned.

    With another dtype, what the model's class keeps in float32 becomes that: models load it so.
    ``divided`` has norms whose channels are divided by powers of two: module -> int8 [channels].
    """
    from permllm_vllm.hf.precision import as_loaded

    reader, dtype = prepared.source.reader(), prepared.asked_dtype
    names = prepared.source.language.names
    model = None if dtype is None else skeleton_of(prepared.source.config)

    def converted(name: str) -> Tensor:
        tensor = reader.tensor(name)
        # Beside the language model nothing is kept, under any name.
        return tensor if dtype is None else as_loaded(model, names.own(name) or "", tensor, dtype)

    def smoothed(name: str) -> Tensor:
        return divided_by(converted(name), divided.get(name.rpartition(".")[0]))

    replaced = {linear.name for linear in prepared.plan.linears}
    for name in reader.names():
        if name.rpartition(".")[0] not in replaced:
            yield name, smoothed(name)  # no tensor is held here while the next is read
