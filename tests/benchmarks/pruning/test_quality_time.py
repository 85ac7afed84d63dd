"""The paper's loop learns, and what both loops take is recorded, on a tiny model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.pruning import quality_time
from benchmarks.pruning.cost_tables import time_to_quality
from benchmarks.pruning.dense_permutations import DenseMaskedLinear, DensePermutation
from benchmarks.pruning.quality_time import QualityTime, learn_densely
from benchmarks.texts import Texts
from permllm_offline.calibration.statistics import last_hidden_state
from permllm_offline.model.loading import load_model
from permllm_offline.preparation.prepared import Prepared, prepare
from permllm_offline.preparation.recipe_input import make_recipe
from tests.offline.tiny_models import save_tokenizer, tiny_llama


@pytest.fixture
def prepared(tmp_path: Path, text_file: Path) -> Prepared:
    """A model with weights of the size of trained ones: the softmax of scores depends on it."""
    tiny_llama(initializer_range=0.1).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    recipe = make_recipe(
        {
            "model": str(tmp_path / "model"),
            "dtype": "bfloat16",
            "method": "permllm-wanda",
            "dataset": str(text_file),
            "num_samples": 16,
            "sequence_length": 16,
            "evaluation_windows": 0,
        }
    )
    return prepare(recipe)


def test_the_dense_loop_learns_masks(prepared: Prepared) -> None:
    assert prepared.windows is not None
    windows, family = prepared.windows.calibration, prepared.plan.family

    @torch.no_grad()
    def states(found: Any) -> torch.Tensor:
        return last_hidden_state(found, family, windows).float()

    targets = states(load_model(prepared.source, prepared.dtype, prepared.device))
    losses = []
    for steps in (0, 10):
        learned = learn_densely(prepared, seed=0, steps=steps, batch=4)
        assert not any(isinstance(part, DenseMaskedLinear) for part in learned.modules())
        weight = learned.model.layers[1].mlp.gate_proj.weight
        assert int((weight != 0).sum()) == weight.numel() // 2
        similarity = torch.nn.functional.cosine_similarity(states(learned), targets, dim=-1)
        losses.append(1 - float(similarity.mean()))
    assert losses[1] < 0.98 * losses[0]  # steps against the gradient raise it


def test_the_dense_loop_scores_and_cools_as_the_authors_do(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepared.windows is not None
    windows = prepared.windows.calibration
    layers: list[DenseMaskedLinear] = []
    temperatures: list[float] = []
    dtypes = set()

    class Noted(DenseMaskedLinear):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            layers.append(self)

    class Cooled(DensePermutation):
        def forward(self) -> torch.Tensor:
            if self.weight is layers[0].shared.permutation.weight:
                temperatures.append(self.temperature)
            dtypes.add(self.weight.dtype)
            return super().forward()

    monkeypatch.setattr(quality_time, "DenseMaskedLinear", Noted)
    monkeypatch.setattr(quality_time, "DensePermutation", Cooled)
    learn_densely(prepared, seed=0, steps=6, batch=len(windows) // 2)
    assert temperatures == pytest.approx([1.0, 1.0, 0.7, 0.7, 0.4, 0.4])
    assert dtypes == {torch.bfloat16}

    dense = load_model(prepared.source, prepared.dtype, prepared.device)
    entered: list[torch.Tensor] = []
    query = dense.model.layers[0].self_attn.q_proj
    query.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0].float()))
    with torch.no_grad():
        dense(windows)
    squares = sum(sequence.square().sum(0) for sequence in entered[0])
    expected = query.weight.float().abs() * (squares / len(windows)).sqrt()
    assert layers[0].linear.weight.shape == query.weight.shape
    torch.testing.assert_close(layers[0].importance, expected.bfloat16())


def test_both_loops_start_warm_and_their_processor_time_is_recorded(
    tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def logged(name: str) -> Callable[..., Any]:
        function = getattr(quality_time, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(quality_time, "smollm2", lambda: tiny_model_directory)
    monkeypatch.setattr(quality_time, "sotu", lambda: Texts(text_file, text_file))
    monkeypatch.setattr(quality_time, "austen", lambda: text_file)
    monkeypatch.setattr(quality_time, "python_manual", lambda: text_file)
    for name in ("load_model", "last_hidden_state", "learn_densely", "prune_model"):
        monkeypatch.setattr(quality_time, name, logged(name))
    found: dict[str, Any] = {}
    for part in QualityTime(0, 1, quick=True).measure({}):
        found |= part
    assert calls[:3] == ["load_model", "last_hidden_state", "learn_densely"]
    assert calls[-1] == "prune_model"
    for run in (found["baseline"], *found["ours"]):
        assert list(run["perplexity"]) == ["in domain", "novels", "manual"]
        assert run["processor_seconds"] > 0
        assert run["load_average"] >= 0
    assert (found["share_of_processor_time"] is not None) == found["reached"]
    calls.clear()
    stopped = {"baseline": found["baseline"]}
    names = [list(part) for part in QualityTime(0, 1, quick=True).measure(stopped)]
    assert names == [["ours"], ["reached", "share_of_time", "share_of_processor_time"]]
    assert "learn_densely" not in calls


def test_shares_are_of_processor_time_where_it_is_known() -> None:
    baseline = {"steps": 40, "seconds": 100.0, "perplexity": {"in domain": 80.0}}
    ours = {"steps": 10, "seconds": 50.0, "perplexity": {"in domain": 79.0}}
    older = time_to_quality({"baseline": baseline, "ours": [ours]})
    assert older.splitlines()[-1] == "| ours | 10 | 50 | 0.50 | 79.0 |"
    baseline, ours = ({**baseline, "processor_seconds": 80.0}, {**ours, "processor_seconds": 20.0})
    references = {"dense": {"in domain": 20.0}, "wanda": {"in domain": 160.0}}
    assert time_to_quality(
        {"baseline": baseline, "ours": [ours], "references": references}
    ).splitlines() == [
        "| loop | steps | seconds | processor seconds | share of time | perplexity, in domain "
        "| x dense | x Wanda |",
        "|---|---|---|---|---|---|---|---|",
        "| dense model |  |  |  |  | 20.0 | 1.00 | 0.12 |",
        "| Wanda, nothing learned |  |  |  |  | 160.0 | 8.00 | 1.00 |",
        "| the paper's dense loop | 40 | 100 | 80 | 1.00 | 80.0 | 4.00 | 0.50 |",
        "| ours | 10 | 50 | 20 | 0.25 | 79.0 | 3.95 | 0.49 |",
    ]


def test_a_text_that_came_later_has_empty_cells_where_it_is_missing() -> None:
    baseline = {"steps": 40, "seconds": 100.0, "perplexity": {"in domain": 80.0}}
    ours = {"steps": 10, "seconds": 50.0, "perplexity": {"in domain": 79.0, "manual": 60.0}}
    references = {"dense": {"in domain": 20.0, "manual": 15.0}, "wanda": {"in domain": 160.0}}
    result = {"baseline": baseline, "ours": [ours], "references": references}
    assert [line.split(" | ")[4:] for line in time_to_quality(result).splitlines()[2:]] == [
        ["20.0", "1.00", "0.12", "15.0", "1.00", " |"],
        ["160.0", "8.00", "1.00", "", "", " |"],
        ["80.0", "4.00", "0.50", "", "", " |"],
        ["79.0", "3.95", "0.49", "60.0", "4.00", " |"],
    ]
