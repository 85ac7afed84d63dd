"""What flows into the linears of a shared-input group, computed no further than there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from permllm_offline.model.family import SharedInputGroup
from permllm_offline.model.states import States
from permllm_offline.reconstruction.layer_work import LayerWork


class _Reached(Exception):
    """Ends a forward pass where its result is known."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.inputs = inputs


class LayerInputs:
    """What flows into the groups of a decoder layer, asked for in forward order.

    The layer runs with the weights that it has when it is asked, so that what was updated before
    is seen. What comes to the experts of a mixture is recorded once: no expert changes it.
    """

    def __init__(self, work: LayerWork) -> None:
        self._work = work
        self._routed: dict[str, list[Sequence[Tensor]]] = {}

    def of(self, group: SharedInputGroup) -> Iterator[Tensor]:
        """Yield the input of a group for each window: [tokens, in_features].

        Where no token reaches an expert, what reads the tokens as they come to the experts gets all
        of these, and what reads products inside it gets nothing.
        """
        if group.experts:
            yield from self._of_expert(group)
            return
        for window in self._work.inputs.one_by_one():
            (inputs, *_) = self._reaching(group.linears[0], window)
            yield inputs.flatten(0, -2)

    def _of_expert(self, group: SharedInputGroup) -> Iterator[Tensor]:
        if group.experts not in self._routed:
            self._routed[group.experts] = [
                [one.cpu() for one in self._reaching(group.experts, window)[:2]]
                for window in self._work.inputs.one_by_one()
            ]
        routed, linear = self._routed[group.experts], group.linears[0]
        path = linear.rpartition(".")[0]
        number, reached = int(path.rpartition(".")[2]), False
        expert, module = map(self._work.layer.get_submodule, (path, linear))
        for states, experts in routed:
            tokens = states[(experts == number).any(1)]
            if len(tokens):
                reached = True
                yield _inputs_of(module, partial(expert, tokens.to(_device(module))))[0]
        if group.reads_whole and not reached:
            yield from (states for states, _ in routed)

    def _reaching(self, name: str, window: States) -> Sequence[Any]:
        """The arguments of a module when a window runs through the layer."""
        module = self._work.layer.get_submodule(name)
        window = window.to(_device(self._work.layer))
        return _inputs_of(module, partial(self._work.forward, window))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def _inputs_of(module: nn.Module, run: Callable[[], Any]) -> Sequence[Any]:
    """The arguments that a forward pass calls a module with, computed no further than there."""
    handle = module.register_forward_pre_hook(_stop)
    try:
        run()
    except _Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
    raise AssertionError("every forward pass calls what it is asked for")


def _stop(module: nn.Module, inputs: Sequence[Any]) -> NoReturn:
    raise _Reached(inputs)


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
