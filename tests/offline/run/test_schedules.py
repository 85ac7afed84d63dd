from itertools import islice

import pytest
import torch

from permllm_offline.run.schedules import cosine, shuffled_batches, warmed_cosine


def test_a_round_shows_every_window_once_and_the_next_is_shuffled_anew() -> None:
    batches = list(islice(shuffled_batches(7, 2, seed=3), 6))
    first, second = torch.cat(batches[:3]), torch.cat(batches[3:])
    assert len(first.unique()) == len(second.unique()) == 6
    assert not torch.equal(first, second)
    again = list(islice(shuffled_batches(7, 2, seed=3), 6))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


def test_the_rate_rises_to_its_peak_and_falls_almost_to_zero() -> None:
    rates = [warmed_cosine(step, 100, 0.1) for step in range(1, 101)]
    assert rates[4] == 0.5
    assert max(rates) == rates[9] == 1.0
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0 < rates[-1] < 0.001
    assert warmed_cosine(1, 1, 0.0) == 1.0


def test_both_fall_along_a_cosine() -> None:
    assert [cosine(step, 3) for step in (1, 2, 3)] == pytest.approx([1.0, 0.75, 0.25])
    warmed = [warmed_cosine(step, 4, 0.5) for step in (1, 2, 3, 4)]
    assert warmed == pytest.approx([0.5, 1.0, 0.75, 0.25])
