"""Windows on their way through the decoder layers, dense and pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from permllm_offline.model.decoder_calls import LayerCall, record_calls, run_windows
from permllm_offline.model.states import States
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.run.steps import Step

STATES_FORMAT = 2
"""Of states that are kept in steps: those of another number are not read."""

_STATES = "states:"
_DENSE, _PRUNED = "dense", "pruned"


@dataclass
class Flow:
    """States before the next decoder layer, on the CPU.

    ``calls`` are the other arguments of each layer's call. Where the flow is ``dense_only``,
    nothing wants the pruned states, and they are the dense ones.
    """

    calls: Sequence[LayerCall]
    dense: States
    pruned: States
    dense_only: bool = False

    @classmethod
    def into(cls, streamed: StreamedModel, windows: Tensor, *, dense_only: bool = False) -> Flow:
        """Embed int64 [windows, sequence_length]."""
        with streamed.embedding():
            calls = record_calls(streamed.model, streamed.family, windows)
        return cls(calls.layers, calls.states, calls.states, dense_only)

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.dense.hidden.shape[0] * self.dense.hidden.shape[1]

    def pass_dense(self, index: int, layer: nn.Module) -> None:
        """Run the dense states through a decoder layer with its dense weights."""
        self.dense = run_windows(layer, self.dense, self.calls[index])
        if self.dense_only:
            self.pruned = self.dense

    def pass_pruned(self, index: int, layer: nn.Module) -> None:
        """Run the pruned states through a decoder layer with its pruned weights."""
        self.pruned = run_windows(layer, self.pruned, self.calls[index])

    def states(self) -> dict[str, Tensor]:
        """What the next decoder layer needs, for ``load``."""
        kinds = {_DENSE: self.dense} | ({} if self.dense_only else {_PRUNED: self.pruned})
        return {
            f"{kind}:{name}": tensor
            for kind, states in kinds.items()
            for name, tensor in states.tensors().items()
        }

    def load(self, states: Mapping[str, Tensor]) -> None:
        """Go on from states as ``states`` gives them."""
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in states.items():
            kind, _, name = key.partition(":")
            kinds.setdefault(kind, {})[name] = tensor
        self.dense = self.dense.with_tensors(kinds[_DENSE])
        self.pruned = self.dense
        if _PRUNED in kinds:
            self.pruned = self.dense.with_tensors(kinds[_PRUNED])


def with_states(step: Step, flows: Mapping[str, Flow]) -> Step:
    """A step that holds the states of some flows too, for ``load_states``."""
    states = {
        f"{_STATES}{name}:{kind}": tensor
        for name, flow in flows.items()
        for kind, tensor in flow.states().items()
    }
    return Step({**step.tensors, **states}, step.facts)


def load_states(step: Step, flows: Mapping[str, Flow]) -> None:
    """Let flows go on from the states that ``with_states`` gave a step of the same flows."""
    for name, flow in flows.items():
        prefix = f"{_STATES}{name}:"
        flow.load(
            {
                key.removeprefix(prefix): step.tensors[key]
                for key in step.tensors
                if key.startswith(prefix)
            }
        )


def without_states(step: Step) -> Step:
    """What ``with_states`` was given."""
    own = {key: step.tensors[key] for key in step.tensors if not key.startswith(_STATES)}
    return Step(own, step.facts)
