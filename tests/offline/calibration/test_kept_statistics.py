"""Statistics that were cut off go on from the last part, to the same bits."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.calibration import statistics
from permllm_offline.calibration.kept_statistics import kept_statistics
from permllm_offline.calibration.statistics import DenseStatistics, PartialSums, collect
from permllm_offline.model.families import FAMILIES
from permllm_offline.run.steps import WorkFolder
from tests.offline.tiny_models import tiny_llama

WINDOWS = torch.randint(0, 64, (7, 10), generator=torch.Generator().manual_seed(0))


class CutOff(Exception):
    """In place of a signal."""


def assert_equal(found: DenseStatistics, expected: DenseStatistics) -> None:
    for mine, other in zip(found.norms, expected.norms, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[group], other[group]) for group in mine)
    assert (found.hidden_states is None) == (expected.hidden_states is None)
    if found.hidden_states is not None and expected.hidden_states is not None:
        assert torch.equal(found.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("hidden_states", [False, True])
def test_statistics_go_on(
    hidden_states: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "SMALLEST_PART", 2)
    measure = partial(
        collect, tiny_llama(), FAMILIES["llama"], WINDOWS, hidden_states=hidden_states
    )
    expected = measure()
    original, passed = statistics.last_hidden_state, []

    def counting(*arguments: Any) -> torch.Tensor:
        if len(passed) == 5:
            raise CutOff
        passed.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(statistics, "last_hidden_state", counting)
    with (
        WorkFolder(tmp_path / "work", "a", resume=False) as work,
        pytest.raises(CutOff),
    ):
        kept_statistics(work, measure)
    passed.clear()
    with WorkFolder(tmp_path / "work", "a", resume=True) as work:
        assert_equal(kept_statistics(work, measure), expected)
        assert len(passed) == 3  # two, two and one window were passed before, the last one in vain
        assert_equal(kept_statistics(work, measure), expected)
        assert len(passed) == 3
        assert len(list(work.directory.glob("*.safetensors"))) == 1


def test_parts_are_an_eighth_of_the_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "SMALLEST_PART", 1)
    windows = WINDOWS.repeat(3, 1)[:20, :4]
    kept: list[PartialSums] = []
    collect(tiny_llama(), FAMILIES["llama"], windows, hidden_states=False, keep=kept.append)
    assert [part.windows for part in kept] == [3, 6, 9, 12, 15, 18]
