"""An output head rounded to int8, as the plugin's option serves it: perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.records.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import Sizes, Subject
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend

ACTIVATIONS = {"16 bits": 1, "8 bits": 512}
"""What the kernel makes of activations, by tokens of a call: one, or all of a window."""
SIZES = Sizes(8, 64, 512, 1, 1)


class RoundedHead(nn.Module):
    """Multiplies as vLLM does with the option.

    Args:
        weight: bfloat16 [words, hidden].
        together: tokens of a call.

    Raises:
        RuntimeError: no kernel of this CPU reads such a head.
    """

    def __init__(self, weight: Tensor, together: int) -> None:
        super().__init__()
        packed = CpuBackend().round_dense(weight)
        if packed is None:
            raise RuntimeError(
                f"{CpuBackend().instruction_set} has no kernel for an output head of int8: measure "
                "on an x86 CPU with AVX2, without PERMLLM_CPU_ISA"
            )
        self._words, self._packed, self._together = len(weight), packed, together

    def forward(self, states: Tensor) -> Tensor:
        """Logits [..., words] of hidden states [..., hidden], which become bfloat16."""
        packed = self._packed
        parts = [
            ops.sparse_linear(
                part, packed.packed, packed.metadata, None, packed.scale, None, self._words, "dense"
            )
            for part in states.bfloat16().flatten(0, -2).split(self._together)
        ]
        return torch.cat(parts).view(*states.shape[:-1], self._words).to(states.dtype)


def measure(subject: Subject, cells: Cells) -> None:
    """The model as it is, and with its head rounded."""
    cells.row({"head": "as it is"}, subject.dense)
    for name, together in ACTIVATIONS.items():
        cells.row({"head": "int8", "activations": name}, partial(_rounded, subject, together))


def _rounded(subject: Subject, together: int) -> dict[str, Any]:
    model = subject.load()
    try:
        model.lm_head = RoundedHead(model.get_output_embeddings().weight, together)
    except RuntimeError as error:
        return {"refused": str(error)}
    return {"perplexity": subject.perplexity(model)}


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each."""
    measured = [row for row in rows if "perplexity" in row]
    labels = [f"{row['head']} {row.get('activations', '')}".strip() for row in measured]
    perplexity_bars(axes, measured, labels)


STUDY = Study("an output head of int8", ("head", "activations"), measure, draw, SIZES)
