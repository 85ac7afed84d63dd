"""Which rows the table of methods has."""

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accuracy
from benchmarks.accuracy import (
    DENSE,
    Accuracy,
    combinations,
    known_method,
    place,
    seeds_of,
    servable,
)
from benchmarks.pruning import checkpoints, commands
from benchmarks.pruning.checkpoints import Checkpoints, Key
from benchmarks.texts import Texts
from permllm_offline.api import evaluate
from permllm_offline.cli import main
from permllm_vllm import ops
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_llama

INT8: Key = ("magnitude", "2:4", 0, "int8")
TOKENS, WINDOWS = 32, 4


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Accuracy:
    """The benchmark of a random bfloat16 model and a random text; commands run in this process."""
    model, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().bfloat16().save_pretrained(model)
    save_tokenizer(model)
    text.write_text(random_text(TOKENS * 5 * WINDOWS, seed=1))

    def run(*arguments: Any) -> None:
        few = ("--num-samples", "8", "--evaluation-windows", "0")
        assert main([*map(str, arguments), *few]) == 0

    for module in (accuracy, checkpoints):
        monkeypatch.setattr(module, "smollm2", lambda: model)
        monkeypatch.setattr(module, "sotu", lambda: Texts(text, text))
        monkeypatch.setattr(module, "SEQUENCE_LENGTH", TOKENS)
    names = ("in domain", "novels", "manual")
    monkeypatch.setattr(accuracy, "unseen_texts", lambda: dict.fromkeys(names, text))
    monkeypatch.setattr(commands, "permllm_offline", run)
    return Accuracy(tmp_path / "checkpoints", WINDOWS, "default")


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_int8_values_are_evaluated_through_the_kernels(
    tiny: Accuracy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, products = ops.sparse_linear, []

    def counted(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        products.append(x.shape[:-1].numel())
        return multiply(x, *arguments)

    monkeypatch.setattr(ops, "sparse_linear", counted)
    dense = dict.fromkeys(("in domain", "novels", "manual"), 100.0)
    row = tiny.completed(INT8, {}, dense)
    assert row["evaluated"] == "kernels"
    assert products == [TOKENS] * (2 * 7 * WINDOWS * len(dense))  # linears of two decoder layers
    checkpoint, _ = Checkpoints(tmp_path / "checkpoints" / "default").baked(INT8)
    windows = {"sequence_length": TOKENS, "max_windows": WINDOWS}
    weights = evaluate(checkpoint, tmp_path / "text.txt", **windows).perplexity
    assert set(row["perplexity"]) == set(dense)
    for text, perplexity in row["perplexity"].items():
        assert perplexity == pytest.approx(weights, rel=0.05)
        assert perplexity != weights
        assert row["ratio"][text] == perplexity / 100


def test_perplexities_of_int8_weights_alone_are_measured_anew(tiny: Accuracy) -> None:
    perplexity = dict.fromkeys(("in domain", "novels"), 9.0)
    row = {"values": "int8", "perplexity": perplexity}
    assert tiny.missing(row) == ["in domain", "novels", "manual"]
    assert tiny.missing(row | {"evaluated": "kernels"}) == ["manual"]
    assert tiny.missing(row | {"values": "bfloat16"}) == ["manual"]
    assert tiny.missing({}) == ["in domain", "novels", "manual"]


def test_the_dense_model_is_evaluated_by_its_weights(
    tiny: Accuracy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "evaluate", lambda *_, **__: 50.0)
    row = tiny.completed(DENSE, {}, None)
    assert row["evaluated"] == "weights"
    assert row["perplexity"] == {"in domain": 50.0, "novels": 50.0, "manual": 50.0}


@pytest.mark.parametrize(
    ("name", "seeds"),
    [
        ("wanda+cp", [4]),
        ("sparsegpt", [4]),
        ("wanda/obs+blockwise", [4, 5, 6]),
        ("wanda+cp/obs", [4]),
        ("permllm-ria", [4, 5, 6]),
        ("permllm-wanda/obs", [4, 5, 6]),
        ("permllm-best", [4, 5, 6]),
        ("permllm-best/obs", [4]),
        ("wanda/distillation", [4, 5, 6]),
        ("wanda+cp/obs+distillation", [4, 5, 6]),
        ("permllm-wanda@last:6", [4, 5, 6]),
        ("permllm-best@no-self-windows", [4, 5, 6]),
    ],
)
def test_what_learns_has_every_seed(name: str, seeds: list[int]) -> None:
    assert list(seeds_of(name, [4, 5, 6])) == seeds


def test_permutations_through_a_whole_layer_are_not_servable() -> None:
    assert servable("wanda+cp")
    assert servable("permllm-best/obs")
    assert not servable("ria+cp-global")
    assert not servable("wanda+cp-global/obs")


def test_rows_come_in_the_order_of_the_table() -> None:
    names, values = ["wanda+cp-global", "permllm-wanda"], ["bfloat16", "int8"]
    assert list(combinations(names, ["2:4", "4:8"], [0, 1], values)) == [
        ("wanda+cp-global", "2:4", 0, "bfloat16"),
        ("permllm-wanda", "2:4", 0, "bfloat16"),
        ("permllm-wanda", "2:4", 0, "int8"),
        ("permllm-wanda", "2:4", 1, "bfloat16"),
        ("permllm-wanda", "2:4", 1, "int8"),
        ("wanda+cp-global", "4:8", 0, "bfloat16"),
        ("permllm-wanda", "4:8", 0, "bfloat16"),
        ("permllm-wanda", "4:8", 0, "int8"),
        ("permllm-wanda", "4:8", 1, "bfloat16"),
        ("permllm-wanda", "4:8", 1, "int8"),
    ]


def test_integers_alone_are_converted() -> None:
    names, values = ["wanda", "wanda@converted"], ["bfloat16", "int8"]
    assert list(combinations(names, ["2:4"], [0], values)) == [
        ("wanda", "2:4", 0, "bfloat16"),
        ("wanda", "2:4", 0, "int8"),
        ("wanda@converted", "2:4", 0, "int8"),
    ]


def test_a_variant_stands_behind_its_method() -> None:
    names = ["permllm-best", "permllm-wanda/obs", "permllm-wanda@last:6", "permllm-wanda"]
    rows = [{"method": n, "pattern": "2:4", "values": "bfloat16", "seed": 0} for n in names]
    rows.append({"method": "dense", "pattern": None})
    found = [row["method"] for row in sorted(rows, key=place)]
    assert found == ["dense", *reversed(names)]


@pytest.mark.parametrize(
    "text",
    [
        "other",
        "wanda/other",
        "wanda/",
        "",
        "permllm-wanda@",
        "permllm-wanda@last:7",
        "dense@last:6",
    ],
)
def test_unknown_methods_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give METHOD or METHOD/RECONSTRUCTION"):
        known_method(text)


@pytest.mark.parametrize(
    "text",
    ["wanda+cp@last:6", "permllm-best@last:6", "permllm-best/obs@no-self-windows"],
)
def test_a_variant_of_what_a_method_does_not_read_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="does not read the entries of @"):
        known_method(text)
