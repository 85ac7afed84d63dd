from collections.abc import Callable

import pytest
import torch

from permllm_offline.calibration.statistics import collect, last_hidden_state
from permllm_offline.model.families import FAMILIES
from permllm_offline.sparsity import importance
from permllm_offline.sparsity.importance import (
    WeightScores,
    column_sums,
    magnitude,
    ria,
    row_chunks,
    row_sums,
    wanda,
)
from tests.offline.tiny_models import tiny_llama

Score = Callable[[torch.Tensor, torch.Tensor | None], WeightScores]


def test_magnitude() -> None:
    assert magnitude(torch.tensor([[-2.0, 1.0]]), None)[:].tolist() == [[2.0, 1.0]]


def test_wanda_multiplies_by_the_norm_of_the_input_channel() -> None:
    scores = wanda(torch.tensor([[-2.0, 1.0], [3.0, -1.0]]), torch.tensor([1.0, 10.0]))[:]
    assert scores.tolist() == [[2.0, 10.0], [3.0, 10.0]]


def test_ria_adds_the_shares_of_column_and_row() -> None:
    scores = ria(torch.tensor([[-2.0, 1.0], [3.0, -1.0]]), torch.tensor([4.0, 9.0]))[:]
    expected = [
        [(2 / 5 + 2 / 3) * 2, (1 / 2 + 1 / 3) * 3],
        [(3 / 5 + 3 / 4) * 2, (1 / 2 + 1 / 4) * 3],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected))


def test_ria_of_zeros_is_zero() -> None:
    assert not ria(torch.zeros(2, 4), torch.ones(4))[:].any()


@pytest.mark.parametrize("score", [wanda, ria])
def test_scores_of_activations_need_them(score: Score) -> None:
    with pytest.raises(ValueError, match="activation norms"):
        score(torch.ones(1, 4), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 200), (128, 192), (9, 130)])
def test_parts_have_the_bits_of_the_whole(
    shape: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=generator).to(dtype)
    norm = torch.rand(shape[1], generator=generator)
    size = weight.float().abs()
    column, row = size.sum(0, keepdim=True), size.sum(1, keepdim=True)
    expected = {
        magnitude: size,
        wanda: size * norm,
        ria: (size / column + size / row) * norm**0.5,
    }
    monkeypatch.setattr(importance, "CHUNK_ELEMENTS", 1000)
    for score, whole in expected.items():
        scores = score(weight, norm)
        chunks = list(row_chunks(scores.shape))
        assert len(chunks) > 1
        assert torch.equal(torch.cat([scores[rows] for rows in chunks]), whole)
        assert torch.equal(scores[:, 64:128], whole[:, 64:128])
        for either in (scores, whole):
            assert torch.equal(column_sums(either), whole.sum(0))
            assert torch.equal(row_sums(either), whole.sum(1))


def test_norms_are_the_root_mean_square_of_each_input_channel() -> None:
    model, family = tiny_llama(), FAMILIES["llama"]
    windows = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, family, windows, hidden_states=True)
    states = model.model(windows, output_hidden_states=True).hidden_states
    first_norm = model.model.layers[0].input_layernorm(states[0])
    expected = first_norm.flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(statistics.norms[0]["qkv"], expected, rtol=1e-4, atol=1e-5)
    assert set(statistics.norms[1]) == {"qkv", "o", "gate_up", "down"}
    assert statistics.norms[1]["down"].shape == (192,)
    assert statistics.hidden_states is not None
    target = last_hidden_state(model, family, windows)
    torch.testing.assert_close(statistics.hidden_states, target, rtol=1e-4, atol=1e-5)
    # The state before the final norm, not after it.
    torch.testing.assert_close(
        model.lm_head(model.model.norm(target)), model(windows).logits, rtol=1e-4, atol=1e-4
    )
