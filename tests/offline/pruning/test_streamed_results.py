from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from permllm_offline.calibration.unreached_experts import Unreached
from permllm_offline.model.states import States
from permllm_offline.pruning.streamed_results import PassedLayers, go_on, keep_passed
from permllm_offline.pruning.streamed_windows import Flow
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.run.steps import Step, WorkFolder
from permllm_offline.sparsity.rounded_layer import RoundedLayer


@pytest.fixture
def work(tmp_path: Path) -> Iterator[WorkFolder]:
    with WorkFolder(tmp_path / "work", "a") as work:
        yield work


def flows(value: float) -> dict[str, Flow]:
    """One whose pruned states nothing wants, and one with both kinds."""
    dense = torch.full((2, 3, 4), value)
    one, two, three = (States(dense + more) for more in range(3))
    return {"one": Flow([], one, one, True), "both": Flow([], two, three)}


PASSED = PassedLayers(
    count=2,
    errors=[LayerError("first", 0.1, 0.05), LayerError("second", 0.3, float("inf"))],
    outputs=[0.25, 1 / 3],
    unpermuted=["..##"],
    rounded=[
        RoundedLayer(
            {"q": torch.tensor([1.0, 2.0]), "k": torch.tensor([3.0])},
            {"q": 0.1},
            {"k": torch.tensor([[16, 3]], dtype=torch.uint8)},
            {"qk": torch.tensor([2, -1], dtype=torch.int8)},
        ),
        RoundedLayer({"q": torch.tensor([4.0])}, {"q": 0.2}),
    ],
    dense_perplexity=7.5,
    unreached=[Unreached(0, 0), Unreached(2, 8)],
)


def assert_equal(found: PassedLayers, expected: PassedLayers) -> None:
    mine, other = found.step(), expected.step()
    assert mine.facts == other.facts
    assert mine.tensors.keys() == other.tensors.keys()
    assert all(torch.equal(mine.tensors[name], other.tensors[name]) for name in mine.tensors)
    assert [layer.scales.keys() for layer in found.rounded] == [{"q", "k"}, {"q"}]
    assert [layer.multipliers.keys() for layer in found.rounded] == [{"k"}, set()]
    assert [layer.exponents.keys() for layer in found.rounded] == [{"qk"}, set()]


def test_results_and_states_come_back(work: WorkFolder) -> None:
    for index in range(2):
        work.step(f"layer-{index:04d}", Step)
    keep_passed(work, PASSED, flows(5.0))
    found = flows(0.0)
    assert_equal(go_on(work, found), PASSED)
    assert (found["one"].dense.hidden == 5).all()
    assert found["one"].pruned is found["one"].dense
    assert (found["both"].dense.hidden == 6).all()
    assert (found["both"].pruned.hidden == 7).all()


def test_without_the_weights_of_a_passed_layer_nothing_is_passed(work: WorkFolder) -> None:
    work.step("layer-0000", Step)
    keep_passed(work, PASSED, flows(5.0))
    found = flows(0.0)
    assert go_on(work, found) == PassedLayers()
    assert not found["one"].dense.hidden.any()


def test_states_go_with_the_last_result(work: WorkFolder) -> None:
    keep_passed(work, PASSED, flows(5.0))
    again = PassedLayers.of(work.step("passes", PASSED.step))
    assert_equal(again, PASSED)
    assert [path.name for path in work.directory.glob("*.safetensors")] == ["passes.safetensors"]
