"""Windows on their way through the decoder layers, dense and pruned."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from permllm_offline.model.decoder_calls import DecoderCalls, record_calls, run_windows
from permllm_offline.streaming import StreamedModel


@dataclass
class Flow:
    """States before the next decoder layer, [windows, sequence_length, hidden] on the CPU."""

    calls: DecoderCalls
    dense: Tensor
    pruned: Tensor

    @classmethod
    def into(cls, streamed: StreamedModel, windows: Tensor) -> Flow:
        """Embed int64 [windows, sequence_length]."""
        calls = record_calls(streamed.model, streamed.family, windows)
        return cls(calls, calls.states, calls.states)

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return self.dense.shape[0] * self.dense.shape[1]

    def pass_dense(self, index: int, layer: nn.Module) -> None:
        """Run the dense states through a decoder layer with its dense weights."""
        self.dense = run_windows(layer, self.dense, self.calls.keywords[index])

    def pass_pruned(self, index: int, layer: nn.Module) -> None:
        """Run the pruned states through a decoder layer with its pruned weights."""
        self.pruned = run_windows(layer, self.pruned, self.calls.keywords[index])
