"""A run that was killed at any moment goes on from there to the same bytes."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.cli import main
from permllm_offline.pruning import streamed_windows
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.reconstruction import distillation
from tests.offline.recipe_lines import Words, with_recipe
from tests.robustness.children import child
from tests.robustness.stages import kill_after, stop_at

FILES = ("model.safetensors", "config.json", "recipe.yaml", "report.json")
SIZES = ("--num-samples", "12", "--sequence-length", "24")
SHORT = {
    "learning": {"steps": 4, "validation_interval": 2, "learning_rate": 0.3},
    "distillation": {
        "steps": 4,
        "validation_interval": 2,
        "self_windows": 2,
        "learning_rate": 0.01,
    },
    "blockwise": {"steps": 4, "validation_interval": 2, "learning_rate": 0.01},
}
METHODS: dict[str, tuple[Words, ...]] = {
    "in memory": ("--method", "permllm-wanda", "--reconstruction", "sparsegpt"),
    "layer by layer": ("--method", "sparsegpt", "--values", "int4"),
    "in windows": ("--method", "permllm-wanda", {"learning": {"scope": "window", "window": 1}}),
    "most sensitive": ("--method", "permllm-wanda", {"learning": {"layers": "auto:1"}}),
    "best": ("--method", "permllm-best", "--values", "int4"),
    "tuned": ("--method", "wanda+cp", "--reconstruction", "obs+blockwise"),
}


def assert_same_files(first: Path, second: Path) -> None:
    for file in FILES:
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


Arguments = Callable[[str, Path], list[str]]


@pytest.fixture(scope="module")
def arguments(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_directory: Path, text_file: Path
) -> Arguments:
    """The command line of a method and an output."""
    recipes = tmp_path_factory.mktemp("recipes")
    data = ("--dataset", str(text_file), *SIZES)

    def arguments(method: str, output: Path) -> list[str]:
        options = with_recipe(recipes / f"{method}.yaml", SHORT, *METHODS[method])
        pattern = ("--pattern", "2:4")  # in processes of their own too
        command = ["prune", str(tiny_model_directory), *data, *pattern]
        return [*command, *options, "--output", str(output)]

    return arguments


@pytest.fixture(scope="module")
def whole(arguments: Arguments, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output of a method's run that nothing stops, made once."""
    found: dict[str, Path] = {}

    def whole(method: str) -> Path:
        if method not in found:
            # As all outputs here: the model card and the report name the folder.
            output = tmp_path_factory.mktemp("whole") / "sparse"
            assert main(arguments(method, output)) == 0
            found[method] = output
        return found[method]

    return whole


@pytest.fixture(scope="module")
def seconds(
    arguments: Arguments, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], float]:
    """What a method's run takes in a child, measured once."""

    @cache
    def measured(method: str) -> float:
        line = arguments(method, tmp_path_factory.mktemp("timed") / "sparse")
        start = time.perf_counter()
        assert child(line, partial(kill_after, 600)).status == 0  # not at all, that is
        return time.perf_counter() - start

    return measured


KILLED_AT = [
    # Perplexity and outputs of the dense model, statistics; what was learned; two layers.
    ("in memory", "a finished step gets its name", 0),
    ("in memory", "a finished step is written:1", 1),
    ("in memory", "a finished step gets its name:2", 2),
    ("in memory", "learning takes a step:3", 3),
    ("in memory", "a finished step gets its name:3", 3),
    ("in memory", "a finished step is written:4", 4),
    ("in memory", "a finished step gets its name:5", 5),
    # Two layers, each with the hidden states after it, and what all gave.
    ("layer by layer", "a finished step is written", 0),
    ("layer by layer", "a finished step is written:1", 1),
    ("layer by layer", "a finished step gets its name:2", 2),
    ("layer by layer", "a finished step is written:3", 3),
    ("layer by layer", "a finished step gets its name:4", 3),
    ("layer by layer", "a shard is written", 3),
    # Each layer learns on its own: what was learned, hidden states behind it.
    ("in windows", "learning takes a step:3", 0),
    ("in windows", "a finished step gets its name:1", 1),
    ("in windows", "learning takes a step:7", 2),
    ("in windows", "a finished step gets its name:3", 3),
    ("in windows", "a finished step is written:4", 3),
    ("in windows", "a shard is written", 6),
    # Perplexity and outputs of the dense model, statistics; what was measured of the layers.
    ("most sensitive", "a finished step is written:4", 4),
    # Then two states of the distillation.
    ("best", "distillation takes a step:1", 4),
    ("best", "a finished step gets its name:4", 4),
    ("best", "distillation takes a step:3", 5),
    ("best", "a finished step is written:5", 5),
    ("best", "a shard is written", 5),
    # Each layer is tuned: it, and the hidden states after it.
    ("tuned", "tuning takes a step:3", 0),
    ("tuned", "tuning takes a step:5", 2),
    ("tuned", "a finished step gets its name:2", 2),
]


@pytest.mark.parametrize(("method", "stage", "kept"), KILLED_AT)
def test_a_killed_run_goes_on_to_the_same_bytes(
    method: str,
    stage: str,
    kept: int,
    arguments: Arguments,
    whole: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    output = tmp_path / "sparse"
    line = arguments(method, output)
    ended = child(line, partial(stop_at, stage, signal.SIGKILL))
    assert ended.status == -signal.SIGKILL, ended.errors
    assert not output.exists()
    work = tmp_path / ".sparse.work"
    assert len(list(work.glob("*.safetensors"))) == kept
    assert main(line) == 0
    assert_same_files(whole(method), output)
    assert not work.exists()


@pytest.mark.parametrize(
    ("method", "stage", "reached"),
    [
        ("tuned", "tuning takes a step:5", "layer 1 of 2"),
        ("best", "distillation takes a step:3", "a part of its step 'distillation'"),
    ],
)
def test_what_was_killed_goes_on_unasked(
    method: str,
    stage: str,
    reached: str,
    arguments: Arguments,
    whole: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "sparse"
    line = arguments(method, output)
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    assert main(line) == 0
    assert_same_files(whole(method), output)
    (said,) = [message for message in caplog.messages if "goes on after" in message]
    assert f"goes on after {reached}; --restart begins anew" in said
    assert "; in all: finished steps are not repeated" in capsys.readouterr().err


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("method", ["best", "tuned"])
def test_the_moment_does_not_matter(
    method: str,
    share: float,
    arguments: Arguments,
    whole: Callable[[str], Path],
    seconds: Callable[[str], float],
    tmp_path: Path,
) -> None:
    """After a share of the time that another run took: it ends anywhere, or is finished."""
    output = tmp_path / "sparse"
    line = arguments(method, output)
    ended = child(line, partial(kill_after, share * seconds(method)))
    assert ended.status in (-signal.SIGKILL, 0), ended.errors
    if not output.exists():
        assert main(line) == 0
    assert_same_files(whole(method), output)


def test_steps_before_the_last_state_are_not_taken_again(
    arguments: Arguments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line, stage = arguments("best", tmp_path / "sparse"), "distillation takes a step:3"
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    original, taken = distillation.warmed_cosine, []

    def recording(step: int, *more: float) -> float:
        taken.append(step)
        return original(step, *more)

    monkeypatch.setattr(distillation, "warmed_cosine", recording)
    assert main(line) == 0
    assert taken == [3, 4]


@pytest.mark.parametrize(
    ("method", "stage", "passes"),
    [
        # Calibration and held-out text, dense and pruned, through the second layer alone.
        ("layer by layer", "a finished step is written:2", [1, 1, 1, 1]),
        ("layer by layer", "a shard is written", []),
        # Dense through the second layer, which learns; then one layer after the other is pruned.
        ("in windows", "learning takes a step:7", [1, 1, 0, 0, 0, 1, 1, 1]),
        ("in windows", "a shard is written", []),
    ],
)
def test_text_does_not_pass_finished_layers_again(
    method: str,
    stage: str,
    passes: list[int],
    arguments: Arguments,
    whole: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "sparse"
    line = arguments(method, output)
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    resident, run_windows = StreamedModel.resident, streamed_windows.run_windows
    numbers: dict[torch.nn.Module, int] = {}
    passed = []

    @contextmanager
    def numbering(self: StreamedModel, index: int) -> Iterator[torch.nn.Module]:
        with resident(self, index) as layer:
            numbers[layer] = index
            yield layer

    def counting(layer: torch.nn.Module, *more: Any) -> torch.Tensor:
        passed.append(numbers[layer])
        return run_windows(layer, *more)

    monkeypatch.setattr(StreamedModel, "resident", numbering)
    monkeypatch.setattr(streamed_windows, "run_windows", counting)
    assert main(line) == 0
    assert passed == passes
    assert_same_files(whole(method), output)
