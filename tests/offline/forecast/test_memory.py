from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig

from permllm_offline.cli import main
from permllm_offline.forecast import memory as memory_forecast
from permllm_offline.forecast.memory import MemoryForecast, shard_bytes
from permllm_offline.model import recomputation
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from tests.offline.forecast.test_duration import WEIGHTS, small_recipe

Expect = Callable[..., MemoryForecast]
LARGEST = 128 * 192
"""Weights of the largest linear; the other sizes of its layer are in WEIGHTS."""

MASKED = 4 * WEIGHTS + WEIGHTS // 8
"""Bytes of a decoder layer in float32, and of its packed masks."""


@pytest.fixture
def expect(tiny_model_directory: Path, text_file: Path) -> Expect:
    def expect(**options: Any) -> MemoryForecast:
        recipe = small_recipe(tiny_model_directory, text_file, **options)
        return memory_forecast.memory_forecast(recipe, prepare(recipe))

    return expect


def test_the_peak_is_that_of_the_largest_layer_or_what_is_outside() -> None:
    assert MemoryForecast(5, [1, 4, 2], 7).peak_bytes == 9
    assert MemoryForecast(5, [1, 4, 2], 10).peak_bytes == 10


def test_a_streamed_layer_its_masks_and_some_of_its_rows(expect: Expect) -> None:
    # All rows of these small linears are scored at once.
    assert expect(method="wanda").layers == [MASKED + 24 * LARGEST] * 2
    assert expect(method="wanda").layers == expect(method="magnitude", values="int8").layers


def test_what_is_left_dense_has_no_masks_and_no_scores(expect: Expect) -> None:
    first_layer, every_down = r"re:.*\.layers\.0\..*", r"re:.*\.down_proj"
    for options in ({"method": "wanda"}, {"method": "wanda", "reconstruction": "obs+blockwise"}):
        whole, found = expect(**options), expect(**options, ignore=[first_layer])
        # The layer and one of its matrices while it is read, which is more than activations.
        assert found.layers == [4 * WEIGHTS + 4 * LARGEST, whole.layers[1]]
        assert found.common == whole.common
        # The file of the output has the layer dense.
        assert found.outside - whole.outside == 2 * WEIGHTS - WEIGHTS // 8
    masks = (WEIGHTS - LARGEST) // 8
    found = expect(method="wanda", ignore=[every_down])
    assert found.layers == [4 * WEIGHTS + masks + 24 * LARGEST] * 2
    # In memory as a whole: the same weights, fewer masks.
    learned = {"method": "permllm-wanda", "learning": {"validation_windows": 3}}
    whole, found = expect(**learned), expect(**learned, ignore=[first_layer])
    assert whole.outside > found.outside
    assert whole.common - found.common == WEIGHTS // 8


def test_channels_are_assigned_over_all_rows_of_a_block(expect: Expect) -> None:
    # Gate and up have 384 rows, o 128 in the one block of each of two query heads.
    assert expect(method="wanda+cp-lsa").layers == [MASKED + 32 * 384 * 64] * 2


def test_masks_that_are_tried_take_the_pruned_half(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_forecast, "SCORED_BYTES", 0)
    monkeypatch.setattr(memory_forecast, "FACTOR_BYTES", 0)
    monkeypatch.setattr(memory_forecast, "USED_FACTOR_BYTES", 0)
    monkeypatch.setattr(memory_forecast, "ROW_BYTES", 0)
    monkeypatch.setattr(memory_forecast, "CHUNK_BYTES", 0)
    # Half of the weights in float32: those that are pruned.
    assert expect(method="sparsegpt").layers == [MASKED + 2 * WEIGHTS] * 2


def test_one_end_of_the_model_is_there_at_a_time(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_forecast, "_baked", lambda linears: 0)
    monkeypatch.setattr(memory_forecast, "shard_bytes", lambda plan: 1)
    # Head and logits of a window are more than embeddings and their copy in the output.
    held_out = {"method": "magnitude", "evaluation_windows": 3, "sequence_length": 120}
    found = expect(**held_out)
    ends, norms, logits = 4 * 64 * 128, 4 * 5 * 128, 120 * 64 * (4 + 4 + 4)
    assert found.common == 3 * 3 * 120 * 128 * 4  # dense and pruned, and those after a layer
    assert found.outside == found.common + ends + norms + logits


def test_an_update_takes_a_moment_its_factor_and_copies(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_forecast, "CHUNK_BYTES", 0)
    # The widest input has 192 channels; 128 rows read it.
    assert expect(method="sparsegpt").layers == [MASKED + 4 * 192**2 + 16 * LARGEST] * 2
    # Of many rows, some after the others.
    monkeypatch.setattr(memory_forecast, "ROWS_AT_ONCE", 96)
    assert expect(method="sparsegpt").layers == [MASKED + 4 * 192**2 + 16 * 96 * 192] * 2
    monkeypatch.setattr(memory_forecast, "USED_FACTOR_BYTES", 0)
    assert expect(method="sparsegpt").layers == [MASKED + 12 * 192**2] * 2


def test_tuning_a_layer_takes_its_states_and_activations(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_forecast, "CHUNK_BYTES", 0)
    tuned = expect(method="wanda", reconstruction="blockwise").layers[0]
    # Of half of the weights: a float32 copy, Adam's two states, a gradient, the best value and the
    # number of the channel. Of the largest matrix, the whole gradient.
    channels = 6 * 128 + 192 + (128 + 64 + 64 + 128 + 192 + 192 + 128)
    states, activations = (4 + 8 + 4 + 4 + 2) * WEIGHTS // 2, 2 * channels * 20 * 4
    assert tuned == MASKED + states + 4 * LARGEST + activations


def test_what_is_not_streamed_holds_the_whole_model(expect: Expect) -> None:
    streamed, learned = expect(method="wanda"), expect(method="permllm-wanda")
    assert streamed.peak_bytes < learned.peak_bytes
    assert learned.layers == [16 * LARGEST] * 2
    assert learned.common - streamed.common == (
        2 * MASKED + 4 * (2 * 64 * 128 + 5 * 128) + 10 * 20 * 128 * 4
    )


def test_a_model_in_memory_has_the_logits_of_a_held_out_window(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expect(method="permllm-wanda", evaluation_windows=3)
    monkeypatch.setattr(memory_forecast, "SCORED_BYTES", 0)
    monkeypatch.setattr(memory_forecast, "_training_bytes", lambda *_: 0)
    monkeypatch.setattr(memory_forecast, "shard_bytes", lambda plan: 1)
    found = expect(method="permllm-wanda", evaluation_windows=3)
    assert found.outside == found.common + 20 * 64 * (4 + 4 + 4)
    assert whole.outside > found.outside


def test_what_learning_keeps_of_activations_is_what_the_recipe_says(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outside(checkpointing: str) -> int:
        learning = {"gradient_checkpointing": checkpointing}
        return expect(method="permllm-wanda", learning=learning).outside

    def layer(checkpointing: str) -> int:
        learning = {"gradient_checkpointing": checkpointing, "scope": "window"}
        return expect(method="permllm-wanda", learning=learning).layers[0]

    channels = 6 * 128 + 192 + (128 + 64 + 64 + 128 + 192 + 192 + 128)
    tokens = 20 * make_recipe({"model": "m"}).learning.windows_at_once
    kept, between = 2 * channels * tokens * 4, tokens * 128 * 4
    # Of two layers those of one are there at a time, and what passes between them.
    assert outside("never") - outside("always") == 2 * kept - (kept + 2 * between)
    assert outside("auto") == outside("never")
    # A layer that learns alone has them all while it is computed again.
    assert layer("always") - layer("never") == between
    monkeypatch.setattr(recomputation, "RECOMPUTE_ABOVE_BYTES", 1)
    assert outside("auto") == outside("always") < outside("never")


def test_layers_that_learn_together_are_in_memory_together(expect: Expect) -> None:
    def learning(window: int) -> MemoryForecast:
        return expect(method="permllm-wanda", learning={"scope": "window", "window": window})

    one, two = learning(1), learning(2)
    # Weights and mask bits; activations of a step's windows; logits of eight blocks of 64, Adam's
    # states, Sinkhorn's five iterations; of the largest linear what is masked and has gradients.
    channels = 6 * 128 + 192 + (128 + 64 + 64 + 128 + 192 + 192 + 128)
    tokens = 20 * make_recipe({"model": "m"}).learning.windows_at_once
    layer = 4 * WEIGHTS + WEIGHTS // 8 + 2 * channels * tokens * 4 + 8 * 64**2 * 4 * 20
    gradient = (4 + 8 * 4 + 10) * LARGEST
    assert one.layers == [layer + gradient] * 2
    assert two.layers == [2 * layer + gradient] * 2
    assert two.common == one.common
    assert one.common - expect(method="wanda").common == 200 * 128 * 4


def test_where_nothing_learns_there_are_no_states_of_learning(expect: Expect) -> None:
    def learning(window: int, layers: str) -> MemoryForecast:
        constants = {"scope": "window", "window": window, "layers": layers}
        return expect(method="permllm-wanda", learning=constants)

    every, last = learning(1, "all"), learning(1, "last:1")
    # The first layer, and a masked copy; importance, ranks and copies of its largest linear.
    assert last.layers == [2 * 4 * WEIGHTS + 16 * LARGEST, every.layers[1]]
    assert last.layers[0] < every.layers[0]
    # The copy of the first layer is there while the other learns beside it.
    beside = [layer + 4 * WEIGHTS for layer in learning(2, "all").layers]
    assert learning(2, "last:1").layers == beside


def test_layers_that_do_not_learn_are_copied_beside_those_that_do(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outside(layers: str) -> int:
        return expect(method="permllm-wanda", learning={"layers": layers}).outside

    # With `auto:1` it may be the first that learns, with the second beside it.
    assert outside("0") == outside("auto:1") == outside("all") + 4 * WEIGHTS
    monkeypatch.setattr(memory_forecast, "_learning_bytes", lambda *_: 0)
    alone = outside("1")
    monkeypatch.setattr(memory_forecast, "_training_bytes", lambda *_: 0)
    monkeypatch.setattr(memory_forecast, "shard_bytes", lambda plan: 1)
    assert alone - outside("1") == 4 * WEIGHTS


@pytest.mark.parametrize(("method", "states"), [("wanda", 2), ("sparsegpt", 3)])
def test_more_text_takes_more_memory(method: str, states: int, expect: Expect) -> None:
    few, many = (expect(method=method, num_samples=count).common for count in (20, 25))
    assert many - few == states * 5 * 20 * 128 * 4


def test_processes_share_what_distillation_holds(
    expect: Expect, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = expect(method="wanda", reconstruction="distillation").peak_bytes
    monkeypatch.setattr(memory_forecast, "count", lambda: 3)
    shared = expect(method="wanda", reconstruction="distillation").peak_bytes
    # Of half of the weights: a float32 copy, Adam's two states, and the best value.
    assert alone - shared == 2 * WEIGHTS * (4 + 8 + 4) // 2 * 2 // 3


def test_a_file_of_the_output_is_as_large_as_a_layer(
    tmp_path: Path,
    tiny_model_directory: Path,
    expect: Expect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def prune(name: str) -> dict[str, torch.Tensor]:
        command = ["prune", str(tiny_model_directory), "--method", "magnitude"]
        assert main([*command, "--output", str(tmp_path / name)]) == 0
        files = sorted((tmp_path / name).glob("*.safetensors"))
        assert len(files) == (1 if name == "one" else 2)
        return {key: tensor for file in files for key, tensor in load_file(file).items()}

    whole, one = expect(method="magnitude"), prune("one")
    monkeypatch.setattr(memory_forecast, "SMALLEST_SHARD_BYTES", 1)
    assert whole.outside - expect(method="magnitude").outside == (
        sum(tensor.nbytes for tensor in one.values()) - 4 * WEIGHTS
    )
    several = prune("several")
    assert several.keys() == one.keys()
    assert all(torch.equal(several[name], one[name]) for name in one)


def test_a_small_model_stays_one_file(tiny_model_directory: Path) -> None:
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    assert shard_bytes(prepare(recipe).plan) == 500_000_000


@pytest.mark.parametrize(("length", "piece"), [(100, 100), (2048, 256)])
def test_pieces_that_a_model_writes_at_once_have_a_cache(length: int, piece: int) -> None:
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    recipe = make_recipe({"model": "any", "sequence_length": length})
    keys_and_values = 2 * 3 * 2 * 16
    found = memory_forecast.sampled_cache_bytes(config, recipe, 2)
    assert found == 64 * piece * keys_and_values * 2
