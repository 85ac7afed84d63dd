"""Statistics are measured once: a run that was cut off reads them, to the same bits."""

from functools import partial
from pathlib import Path

import pytest
import torch

from permllm_offline.calibration.kept_statistics import kept_statistics
from permllm_offline.calibration.statistics import DenseStatistics, collect
from permllm_offline.model.families import FAMILIES
from permllm_offline.run.steps import WorkFolder
from tests.offline.tiny_models import tiny_llama

WINDOWS = torch.randint(0, 64, (7, 10), generator=torch.Generator().manual_seed(0))


def unwanted() -> DenseStatistics:
    pytest.fail("measured again")


@pytest.mark.parametrize("hidden_states", [False, True])
def test_what_is_kept_is_what_was_measured(hidden_states: bool, tmp_path: Path) -> None:
    measure = partial(
        collect, tiny_llama(), FAMILIES["llama"], WINDOWS, hidden_states=hidden_states
    )
    expected = measure()
    with WorkFolder(tmp_path / "work", "a") as work:
        kept_statistics(work, measure)
        found = kept_statistics(work, unwanted)
    for mine, other in zip(found.norms, expected.norms, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[group], other[group]) for group in mine)
    assert (found.hidden_states is None) == (expected.hidden_states is None)
    if found.hidden_states is not None and expected.hidden_states is not None:
        assert torch.equal(found.hidden_states, expected.hidden_states)
