"""What a streamed prune takes, files of the output included, is what the forecast says."""

import ctypes
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.forecast import memory as memory_forecast
from permllm_offline.permutation import masked_linear
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.run.costs import peak_bytes
from permllm_offline.run.steps import WorkFolder
from tests.offline.tiny_models import save_tokenizer, tiny_model
from tests.robustness.children import child

_MMAP_THRESHOLD = -3
"""Of glibc's ``mallopt``."""

SIZES = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_attention_heads": 12,
    "num_hidden_layers": 4,
    "vocab_size": 8192,
}
LAYER = 4 * (4 * 768**2 + 3 * 768 * 2048)
"""Bytes of a decoder layer in float32; embeddings and head take 25 MB each."""

WINDOWS, LENGTH = 8, 32
HIDDEN = 2 * WINDOWS * LENGTH * 768 * 4
"""Bytes of hidden states before a decoder layer and after it."""

WINDOW = 2 * (768 + 2 * 2048) * LENGTH * 4
"""Bytes of what gate and up read and give for one window, and as much in between."""

STEP = 2 * (4 * 2 * 768 + 3 * (768 + 2048)) * 2 * LENGTH * 4
"""Bytes of what a learning step of two windows keeps: what each linear of a decoder layer reads and
gives, and as much in between."""

NOISE = 4 << 20
"""Of the program itself, whose heaps and pages of libraries differ from run to run: a seventh of a
decoder layer."""

BLOCKWISE = {"blockwise": {"steps": 2, "validation_windows": 2}}
PART_ELEMENTS = 1 << 17
"""Few beside the weights of a layer, as the real number is beside those of a large model."""

LEARNING = {"scope": "window", "window": 2, "steps": 2, "windows_per_step": 2, "windows_at_once": 2}
LEARNING_ALONE = {"window": 1, "sinkhorn_iterations": 0}


@dataclass(frozen=True)
class Measured:
    """Bytes that a prune took beside the program, its forecast, and that of a model in memory."""

    taken: int
    forecast: int
    whole: int


def record_peak(file: Path) -> None:
    """Make this process write into a file what it held at most until its checkpoint is complete.

    Each tensor has memory of its own that goes back to the system, as those of large models have,
    and buffers that the library of products keeps for large ones are there for the tiny model too.
    """
    memory_forecast.SMALLEST_SHARD_BYTES = 1
    masked_linear.PART_ELEMENTS = PART_ELEMENTS
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 16)
    torch.nn.functional.linear(torch.ones(WINDOWS * LENGTH, 768), torch.ones(2048, 768))
    remove = WorkFolder.remove

    def recording(work: WorkFolder) -> None:
        file.write_text(str(peak_bytes()), encoding="ascii")
        remove(work)

    WorkFolder.remove = recording  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of some size."""
    directory = tmp_path_factory.mktemp("models") / "some"
    whole = tiny_model("llama", num_key_value_heads=12, **SIZES)
    assert LAYER <= sum(one.nbytes for one in whole.model.layers[0].parameters()) < 1.01 * LAYER
    whole.save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def measured(
    directory: Path, models: tuple[Path, Path], text: Path, options: dict[str, Any]
) -> Measured:
    """Prune a model, and before it a tiny one for what the program itself takes."""
    recipe = directory / "recipe.yaml"
    recipe.write_text(json.dumps(given(text, options)), encoding="utf-8")
    peaks = []
    for model in models:
        command = [
            "prune",
            str(model),
            "--output",
            str(directory / "sparse"),
            "--force",
            "--recipe",
            str(recipe),
        ]
        prepare = partial(record_peak, directory / "peak")
        ended = child(command, prepare, plots=True)
        assert ended.status == 0, ended.errors
        peaks.append((directory / "peak").read_text(encoding="ascii"))
    if "None" in peaks:
        pytest.skip("the system does not tell what a process held at most")
    assert len(list((directory / "sparse").glob("model-*.safetensors"))) > 2
    streamed = forecast(models[1], text, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_forecast, "can_stream", lambda recipe: False)
        whole = forecast(models[1], text, options)
    return Measured(int(peaks[1]) - int(peaks[0]), streamed, whole)


Pruned = Callable[[dict[str, Any]], Measured]


@pytest.fixture
def pruned(
    tmp_path: Path,
    model: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Pruned:
    """What a prune by some options takes, in files of the output as small as can be."""
    monkeypatch.setattr(memory_forecast, "SMALLEST_SHARD_BYTES", 1)
    monkeypatch.setattr(memory_forecast, "PART_ELEMENTS", PART_ELEMENTS)
    return partial(measured, tmp_path, (tiny_model_directory, model), text_file)


def forecast(model: Path, text: Path, options: dict[str, Any]) -> int:
    """The most bytes that a prune will hold."""
    recipe = make_recipe(given(text, options) | {"model": str(model)})
    return memory_forecast.peak_bytes(recipe, prepare(recipe))


def given(text: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Entries of the recipe of every prune here."""
    fixed = {"pattern": "2:4", "num_samples": WINDOWS, "sequence_length": LENGTH}
    return {"dataset": str(text)} | fixed | options


@pytest.mark.parametrize(
    "options",
    [
        {"method": "wanda+cp"},
        {"method": "ria"},
        {"method": "wanda+cp-lsa"},
        {"method": "wanda+cp", "reconstruction": "obs"},
        {"method": "wanda+cp", "reconstruction": "blockwise"} | BLOCKWISE,
        {"method": "permllm-wanda", "learning": LEARNING},
        {"method": "permllm-wanda", "learning": LEARNING | LEARNING_ALONE},
    ],
    ids=["masks", "relative", "assigned", "update", "tuning", "learning", "learning alone"],
)
def test_the_peak_is_the_forecast(options: dict[str, Any], pruned: Pruned) -> None:
    found = pruned(options)
    assert 0.75 < found.taken / found.forecast < 1.2, found
    assert found.whole > 1.5 * found.forecast  # a model in memory would be seen
    alone = options.get("learning", {}).items() >= LEARNING_ALONE.items()
    if alone or options.keys() == {"method"}:  # one layer that learns, or masks alone
        activations = STEP if alone else WINDOW
        assert found.taken <= 2 * LAYER + HIDDEN + activations + NOISE, found
