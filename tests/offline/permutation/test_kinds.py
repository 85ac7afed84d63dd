"""What the table says of a kind of permutation is what it does."""

from typing import Any

import pytest
import torch

from permllm_offline.model.family import SharedInputGroup
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.permutation import linear_assignment
from permllm_offline.permutation.kinds import PERMUTATIONS
from permllm_vllm.checkpoint.pattern import Pattern


@pytest.mark.parametrize("name", PERMUTATIONS)
def test_what_assigns_channels_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    solve, solved = linear_assignment.linear_sum_assignment, []

    def counted(*arguments: Any, **options: Any) -> Any:
        solved.append(arguments)
        return solve(*arguments, **options)

    monkeypatch.setattr(linear_assignment, "linear_sum_assignment", counted)
    kind = PERMUTATIONS[name]
    if kind.allocate is not None:
        layout = GroupLayout(SharedInputGroup("x", ("a",)), 64, 64, Heads(1, 1, 64))
        scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
        kind.allocate(layout, {"a": scores}, Pattern(2, 4))
    assert bool(solved) == kind.assigns
