"""The experts of a layer come out of a conversion alike, as whoever serves them as one demands."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig

from permllm_offline.conversion.pattern_choice import Judged, ignored
from permllm_offline.conversion.report import ConversionReport
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.conversion.verdicts import GroupVerdict
from permllm_offline.errors import OfflineError
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.lookup import family_of
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import prune_weight, same_weights
from tests.offline.tiny_models import save_tokenizer, tiny_model

EXPERTS = 4
GATE, UP, DOWN = GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
FIRST_LAYER = r"re:model\.layers\.0\.mlp\.experts\..*"

Change = Callable[[dict[str, Tensor], Mapping[str, Tensor]], None]
"""Changes pruned tensors, given the dense ones."""


def name_of(layer: int, expert: int, linear: str) -> str:
    return f"model.layers.{layer}.mlp.experts.{expert}.{linear}"


def experts_of(layer: int, *linears: str) -> set[str]:
    return {name_of(layer, expert, one) for expert in range(EXPERTS) for one in linears}


def save_mixture(directory: Path, change: Change) -> Path:
    """Two layers of experts, all linears pruned."""
    tiny_model("qwen3_moe", mlp_only_layers=[], num_experts=EXPERTS).save_pretrained(directory)
    save_tokenizer(directory)
    dense = load_file(directory / "model.safetensors")
    tensors = {n: prune_weight(one) if "_proj" in n else one for n, one in dense.items()}
    change(tensors, dense)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def nothing(tensors: dict[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    return None


def one_dense_expert(tensors: dict[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    for linear in GATE_UP_DOWN:
        tensors[f"{name_of(0, 1, linear)}.weight"] = dense[f"{name_of(0, 1, linear)}.weight"]


def one_dense_gate(tensors: dict[str, Tensor], dense: Mapping[str, Tensor]) -> None:
    tensors[f"{name_of(0, 2, GATE)}.weight"] = dense[f"{name_of(0, 2, GATE)}.weight"]


def converted(tmp_path: Path, change: Change) -> tuple[ConversionReport, QuantizationConfig]:
    """Convert a mixture; the output is valid, the same function, and dense again the source."""
    source, output = save_mixture(tmp_path / "source", change), tmp_path / "out"
    report = convert_to_sparse(str(source), output)
    assert validate(output) == []
    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, dense, served = (
            load(open_source(str(folder)), torch.float32, torch.device("cpu"))(tokens).logits
            for load, folder in ((load_model, source), (load_model, output), (load_served, output))
        )
    assert (dense - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (served - expected).abs().max() < 1e-4 * expected.abs().max()
    convert_to_dense(str(output), tmp_path / "back")
    assert same_weights(source, tmp_path / "back")
    config = json.loads((output / "config.json").read_text())
    return report, QuantizationConfig.from_dict(config["quantization_config"])


def test_every_expert_is_sparse(tmp_path: Path) -> None:
    report, quantization = converted(tmp_path, nothing)
    assert report.left_dense == []
    assert not any("experts" in entry for entry in quantization.ignore)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (one_dense_expert, "mlp.experts.1 cannot be sparse: mlp.experts.1.gate_proj keeps 100.0%"),
        (one_dense_gate, "mlp.experts.2 cannot be sparse: mlp.experts.2.gate_proj keeps 100.0%"),
    ],
)
def test_all_experts_stay_dense_where_one_does(tmp_path: Path, change: Change, reason: str) -> None:
    report, quantization = converted(tmp_path, change)
    assert [entry for entry in quantization.ignore if "experts" in entry] == [FIRST_LAYER]
    assert {one.name for one in report.left_dense} == experts_of(0, *GATE_UP_DOWN)
    assert all(quantization.is_ignored(name) for name in experts_of(0, *GATE_UP_DOWN))
    (found,) = {one.reason for one in report.left_dense}
    assert reason in found
    with pytest.raises(OfflineError, match=r"the first is model\.layers\.0\.mlp.*served as one"):
        convert_to_sparse(str(tmp_path / "source"), tmp_path / "strict", strict=True)


@pytest.mark.parametrize("lost", [(GATE,), (UP,), GATE_UP_DOWN])
def test_experts_that_lack_a_linear_are_refused(tmp_path: Path, lost: tuple[str, ...]) -> None:
    def without(tensors: dict[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        for linear in lost:
            del tensors[f"{name_of(1, 2, linear)}.weight"]

    source = save_mixture(tmp_path / "source", without)
    message = rf"model\.layers\.1 stores {12 - len(lost)} of the 12 linears of its experts, and "
    with pytest.raises(OfflineError, match=rf"{message}not mlp\.experts\.2\.{lost[0]}: "):
        convert_to_sparse(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("gate_up_proj", (EXPERTS, 63, 128)),
        ("down_proj", (EXPERTS * 64, 128)),
    ],
)
def test_experts_in_one_tensor_of_another_form_are_refused(
    tmp_path: Path, kind: str, shape: tuple[int, ...]
) -> None:
    def fused(tensors: dict[str, Tensor], dense: Mapping[str, Tensor]) -> None:
        tensors[f"model.layers.0.mlp.experts.{kind}"] = torch.zeros(shape)

    source = save_mixture(tmp_path / "source", fused)
    with pytest.raises(OfflineError, match=rf"experts\.{kind} holds all experts of its layer"):
        convert_to_sparse(str(source), tmp_path / "out")


@pytest.mark.parametrize("count", [1, 99, 100, 400])
def test_ignore_stays_short_for_many_layers(count: int) -> None:
    config: Any = AutoConfig.for_model("qwen3_moe", num_experts=2, num_experts_per_tok=1)
    family = family_of(config)
    every = [
        GroupVerdict(GroupLayout(group, 64, 64, Heads(1, 1, 64)), "no", {})
        for group in family.groups
        if group.experts
    ]
    held = [GroupVerdict(one.layout, "", {}) for one in every]
    layers = [every if index % 2 else held for index in range(2 * count)]
    source: Any = SimpleNamespace(names=list)
    entries = ignored(Judged(source, family, Pattern(2, 4), layers))
    assert sum(entry.startswith("re:") for entry in entries) <= 100
    assert (FIRST_LAYER.replace("0", "1", 1) in entries) == (count < 100)
    quantization = QuantizationConfig(
        pattern="2:4", block_size=64, value_dtype="bfloat16", ignore=entries
    )
    for index in range(2 * count):
        assert quantization.is_ignored(name_of(index, 1, UP)) == bool(index % 2)
