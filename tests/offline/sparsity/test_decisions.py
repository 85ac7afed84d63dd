from typing import Any

import pytest
import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.family import SharedInputGroup
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.sparsity import decisions, importance
from permllm_offline.sparsity.decisions import decide
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical

LAYOUT = GroupLayout(SharedInputGroup("x", ("a",)), 32, 32, Heads(1, 1, 32))


def test_the_canonical_form_is_kept_and_changes_no_mask() -> None:
    importance = torch.rand(6, 32, generator=torch.Generator().manual_seed(0))
    permutation = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    form = canonical(permutation, 32, Pattern(2, 4))
    first = decide(LAYOUT, {"a": importance}, permutation, Pattern(2, 4))
    second = decide(LAYOUT, {"a": importance}, form, Pattern(2, 4))
    assert first.permutation is not None
    assert torch.equal(first.permutation, form)
    assert torch.equal(first.mask("a"), second.mask("a"))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        ),
    ],
)
def test_a_decision_is_on_the_cpu(device: str) -> None:
    importance = torch.rand(6, 32, device=device)
    permutation = torch.randperm(32, device=device).to(torch.uint8)
    decision = decide(LAYOUT, {"a": importance}, permutation, Pattern(2, 4))
    assert decision.permutation is not None
    assert decision.permutation.device == decision.masks["a"].device == torch.device("cpu")


def test_retained_importance_is_a_share_of_all() -> None:
    importance = torch.tensor([[4.0, 3, 2, 1] * 8])
    decision = decide(LAYOUT, {"a": importance}, None, Pattern(2, 4))
    assert decision.retained["a"] == pytest.approx(0.7)
    assert decision.mask("a").tolist() == [[True, True, False, False] * 8]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_importance_that_is_not_finite_is_refused(value: float) -> None:
    importance = torch.rand(2, 32)
    importance[1, 3] = value
    with pytest.raises(OfflineError, match="importance of a is not finite"):
        decide(LAYOUT, {"a": importance}, None, Pattern(2, 4))


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
def test_rows_are_decided_alike_in_any_parts(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = torch.rand(50, 32, generator=torch.Generator().manual_seed(0))
    permutation = torch.randperm(32, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    expected = choose_mask(scores, pattern, canonical(permutation, 32, pattern), 32)
    seen: list[int] = []

    def watched(part: Tensor, *arguments: Any) -> Tensor:
        seen.append(len(part))
        return choose_mask(part, *arguments)

    monkeypatch.setattr(decisions, "choose_mask", watched)
    found = []
    for elements in (32, 7 * 32, 50 * 32):
        monkeypatch.setattr(importance, "CHUNK_ELEMENTS", elements)
        found.append(decide(LAYOUT, {"a": scores}, permutation, pattern))
        assert torch.equal(found[-1].mask("a"), expected)
    assert seen == [1] * 50 + [7] * 7 + [1] + [50]
    assert found[0].retained == found[1].retained == found[2].retained


def test_a_layer_of_zeros_is_pruned_too() -> None:
    decision = decide(LAYOUT, {"a": torch.zeros(2, 32)}, None, Pattern(2, 4))
    assert decision.retained["a"] == 0.0
    assert decision.mask("a").sum() == 32
