"""Mixtures of experts, from statistics to the checkpoint, also where no token reaches an expert."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm_offline.api import prune
from permllm_offline.calibration.statistics import collect
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.duration import Forecast, Speed, forecast
from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.lookup import family_of
from permllm_offline.preparation.prepared import prepare
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.group_inputs import LayerInputs
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.text.evaluation import perplexity
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.forecast.test_duration import small_recipe
from tests.offline.tiny_models import save_tokenizer, tiny_model

CPU = torch.device("cpu")
LONELY = 4
"""The first expert that no token reaches."""

WINDOWS = torch.randint(0, 64, (5, 12), generator=torch.Generator().manual_seed(0))


def with_unreached(model_type: str = "qwen3_moe", lonely: int = 1, **options: object) -> Any:
    """A model whose router never takes its last experts: two of the others are always above."""
    options = {"mlp_only_layers": [], "decoder_sparse_step": 1} | options
    options["num_experts"] = LONELY + lonely
    model = tiny_model(model_type, **options)
    with torch.no_grad():
        for layer in model.model.layers:
            router = layer.mlp.gate.weight
            router[1], router[3], router[LONELY:] = -router[0], -router[2], 0
    return model


def experts_read(model: Any) -> list[tuple[Tensor, Tensor]]:
    """What comes to the experts of the first layer in each window: states, and their experts."""
    found: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[0].mlp.experts
    with experts.register_forward_pre_hook(lambda _, inputs: found.append(inputs[:2])):
        for window in WINDOWS:
            model(window[None])
    return found


def test_an_expert_is_measured_by_its_own_tokens(caplog: pytest.LogCaptureFixture) -> None:
    model = with_unreached().requires_grad_(False)
    family = family_of(model.config)
    with caplog.at_level(logging.WARNING):
        norms = collect(model, family, WINDOWS, hidden_states=False).norms[0]
    (warning,) = caplog.messages
    assert warning.startswith("2 of 10 experts (decoder layers 0, 1) got no token of the")
    assert norms.keys() == {
        group.name for group in family.groups_of(lambda name: "experts" in name)
    }
    read = experts_read(model)
    states, chosen = (torch.cat(parts) for parts in zip(*read, strict=True))

    def expected(tokens: Tensor) -> Tensor:
        return (tokens.square().sum(0) / WINDOWS.numel()).sqrt()

    for number in range(LONELY):
        mine = states[(chosen == number).any(1)]
        assert 0 < len(mine) < len(states)
        expert = model.model.layers[0].mlp.experts[number]
        inner = expert.act_fn(expert.gate_proj(mine)) * expert.up_proj(mine)
        name = f"mlp.experts.{number}"
        torch.testing.assert_close(norms[f"{name}.gate_up"], expected(mine))
        torch.testing.assert_close(norms[f"{name}.down"], expected(inner))
    torch.testing.assert_close(norms[f"mlp.experts.{LONELY}.gate_up"], expected(states))
    assert torch.equal(norms[f"mlp.experts.{LONELY}.down"], torch.ones(64))


@pytest.mark.parametrize("method", ["wanda+cp", "permllm-wanda"])
def test_experts_that_stay_dense_are_not_warned_of(
    method: str, tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with_unreached().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    options = {"dataset": text_file, "method": method, **SIZES}
    if method == "permllm-wanda":
        options["learning"] = {"steps": 1}
    for ignore, expected in (([], 1), ([r"re:.*\.experts\..*"], 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prune(tmp_path / "model", tmp_path / "sparse", force=True, ignore=ignore, **options)
        assert sum("got no token" in message for message in caplog.messages) == expected


def test_what_flows_into_an_expert_is_computed_once() -> None:
    model = with_unreached().requires_grad_(False)
    family, layer = family_of(model.config), model.model.layers[0]
    calls = record_calls(model, family, WINDOWS)
    work = LayerWork(
        0, layer, calls.layers[0], [], calls.states, calls.states.hidden, Recipe(model="tiny")
    )
    inputs, read = LayerInputs(work), experts_read(model)
    groups = {group.name: group for group in family.groups}
    passes: list[object] = []
    layer.mlp.experts.register_forward_pre_hook(lambda *_: passes.append(1))
    for number in range(LONELY):
        expected = [states[(chosen == number).any(1)] for states, chosen in read]
        found = torch.cat(list(inputs.of(groups[f"mlp.experts.{number}.gate_up"])))
        torch.testing.assert_close(found, torch.cat(expected))
        layer.mlp.experts[number].up_proj.weight.data.zero_()
        assert not torch.cat(list(inputs.of(groups[f"mlp.experts.{number}.down"]))).any()
    everything = torch.cat(list(inputs.of(groups[f"mlp.experts.{LONELY}.gate_up"])))
    torch.testing.assert_close(everything, torch.cat([states for states, _ in read]))
    assert list(inputs.of(groups[f"mlp.experts.{LONELY}.down"])) == []
    assert len(passes) == len(WINDOWS)


SIZES: dict[str, Any] = {"num_samples": 8, "sequence_length": 24, "evaluation_windows": 3}
SHORT = {"steps": 3, "validation_interval": 2, "validation_windows": 2}
LEARNING = SHORT | {"learning_rate": 0.3, "windows_per_step": 2}
DISTILLATION = SHORT | {"self_windows": 2, "learning_rate": 0.01, "windows_per_step": 2}
METHODS: dict[str, dict[str, Any]] = {
    "wanda+cp": {"method": "wanda+cp"},
    "int8": {"method": "wanda+cp", "values": "int8"},
    "ria": {"method": "ria+cp-lsa"},
    "sparsegpt": {"method": "sparsegpt"},
    "tuned": {
        "method": "wanda+cp",
        "reconstruction": "obs+blockwise",
        "blockwise": SHORT | {"learning_rate": 0.01, "windows_per_step": 2},
    },
    "best": {"method": "permllm-best", "distillation": DISTILLATION},
    "learned": {"method": "permllm-wanda", "learning": LEARNING},
    "learned in windows": {
        "method": "permllm-wanda",
        "learning": LEARNING | {"scope": "window", "window": 1},
    },
}


@pytest.mark.parametrize("unreached", [0, 2], ids=["all reached", "two unreached"])
@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_is_the_model_that_was_pruned(
    method: str,
    unreached: int,
    tmp_path: Path,
    text_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = with_unreached(lonely=unreached) if unreached else tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        report = prune(
            tmp_path / "model", tmp_path / "sparse", dataset=text_file, **SIZES, **METHODS[method]
        )
    warnings = [one for one in caplog.messages if "got no token of the calibration text" in one]
    assert len(warnings) == bool(unreached)
    assert validate(tmp_path / "sparse") == []
    reader = CheckpointReader(tmp_path / "sparse")
    assert len(reader.sparse_layers()) == 2 * 4 + (2 * 3 * 6 if unreached else 3 * 4 + 3)
    held_out = prepare(report.recipe).windows.held_out
    loaded = load_model(open_source(str(tmp_path / "sparse")), torch.float32, CPU)
    assert perplexity(loaded, held_out) == pytest.approx(report.perplexity_after, rel=1e-3)
    for layer in report.layers:
        assert 0 < layer.retained_importance < 1
    if unreached:
        alone = f"model.layers.0.mlp.experts.{LONELY}.up_proj"
        assert float(reader.layer(alone).values.float().abs().min()) > 0


def test_experts_are_left_dense_by_choice(tmp_path: Path, text_file: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    ask = {"dataset": text_file, "method": "wanda+cp", **SIZES}
    output = tmp_path / "sparse"
    report = prune(tmp_path / "model", output, ignore=[r"re:.*\.experts\..*"], **ask)
    assert len(report.left_dense) == 4 * 3
    assert not any(".experts." in layer.name for layer in report.layers)
    assert validate(output) == []
    source = open_source(str(output))
    models = [load(source, torch.float32, CPU) for load in (load_model, load_served)]
    with torch.no_grad():
        masked, served = (model(WINDOWS).logits for model in models)
    torch.testing.assert_close(served, masked, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", [r"1\..*", r".*\.down_proj"])
def test_some_experts_are_not_left_dense(tmp_path: Path, text_file: Path, part: str) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    message = (
        r"experts\.\d.*dense, but not .* and \d more: vLLM serves the experts of a layer as one"
    )
    with pytest.raises(OfflineError, match=message):
        prune(
            tmp_path / "model",
            tmp_path / "sparse",
            dataset=text_file,
            method="wanda+cp",
            ignore=[rf"re:.*\.experts\.{part}"],
            **SIZES,
        )


def test_experts_are_one_line_of_each_table(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    data = ("--dataset", str(text_file), "--num-samples", "4", "--sequence-length", "16")
    prune_it = ["prune", str(tmp_path / "model"), "--output", str(tmp_path / "sparse"), *data]
    sparse, line = str(tmp_path / "sparse"), "model.layers.0.mlp.experts.*.gate_proj (4)"
    commands = {
        ("plan", str(tmp_path / "model")): "model.layers.*.mlp.experts.*.gate_proj",
        (*prune_it, "--method", "wanda", "--dry-run"): line,
        (*prune_it, "--method", "wanda"): "pruned linear layers",
        ("inspect", sparse): line,
        ("convert", sparse, "--to", "dense", "--output", str(tmp_path / "dense")): "experts.*.gate",
    }
    for command, text in commands.items():
        assert main(list(command)) == 0
        shown = capsys.readouterr().out
        assert text in shown
        assert "experts.0" not in shown
    page = (tmp_path / "sparse" / "report.html").read_text()
    assert line in page
    assert "experts.0" not in page


def test_forecasts_count_the_experts_that_a_token_meets(tmp_path: Path, text_file: Path) -> None:
    def expected(experts: int, **options: Any) -> Forecast:
        model = tmp_path / str(experts)
        tiny_model("qwen3_moe", num_experts=experts, mlp_only_layers=[]).save_pretrained(model)
        save_tokenizer(model)
        recipe = small_recipe(model, text_file, **options)
        return forecast(recipe, prepare(recipe), speed=Speed(1e6, 1e6))

    few, many = (expected(experts, method="wanda") for experts in (4, 16))
    met = 128 * (128 + 64 + 64 + 128) + 2 * 3 * 64 * 128
    assert few.layer_seconds == pytest.approx([2 * 200 * met / 1e6] * 2)
    assert many.layer_seconds == few.layer_seconds
    beside = 12 * 3 * 64 * 128
    assert many.memory.layers[0] - few.memory.layers[0] == 4 * beside + beside // 8
    # What comes to the experts while they are updated: hidden states of the text.
    blockwise, both = (
        expected(4, method="wanda", reconstruction=name) for name in ("blockwise", "obs+blockwise")
    )
    assert both.memory.common - blockwise.memory.common == 200 * 128 * 4
