"""What flows into the linears of a shared-input group, computed no further than there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from permllm_offline.model.modules import linear_of
from permllm_offline.reconstruction.layer_work import LayerWork


class _Reached(Exception):
    """Ends a forward pass where its result is known."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


@torch.no_grad()
def group_inputs(work: LayerWork, linear: str) -> Iterator[Tensor]:
    """Yield the input of a linear for each window: [tokens, in_features].

    The layer runs with the weights that it has now, so that what was updated before is seen.
    """
    module = linear_of(work.layer, linear)
    device = module.weight.device
    for window in work.inputs:
        handle = module.register_forward_pre_hook(_stop)
        try:
            work.forward(window[None].to(device))
        except _Reached as reached:
            yield reached.inputs.flatten(0, -2)
        finally:
            handle.remove()


def _stop(module: nn.Module, inputs: Sequence[Any]) -> NoReturn:
    raise _Reached(inputs[0])


def add_second_moment(moment: Tensor, inputs: Iterable[Tensor], order: Tensor) -> None:
    """Add x x^T of all tokens: half of the Hessian of every row's squared output error.

    Args:
        moment: float32 [channels, channels].
        inputs: [tokens, channels] each, any dtype and device.
        order: int64 [channels], which channel comes where in the moment.
    """
    order = order.to(moment.device)
    for tokens in inputs:
        ordered = tokens.to(moment.device).float()[:, order]
        moment.addmm_(ordered.t(), ordered)
