"""A model of a sparse checkpoint is never served with a parameter that nothing was loaded into."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import LoadConfig, VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    QKVParallelLinear,
    ReplicatedLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader import DefaultModelLoader, get_model_loader
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.compat import MODEL_LOADERS
from permllm_vllm.quantization import model_loader
from permllm_vllm.quantization.head import HeadMethod
from tests.quantization.sparse_modules import config, sparse_module

CHANNELS, WORDS = 128, 64
QKV = ["attention.q_proj", "attention.k_proj", "attention.v_proj"]
ROWS = (32, 16, 16)


class Attention(torch.nn.Module):
    def __init__(self, quantization: Any) -> None:
        super().__init__()
        self.qkv_proj = QKVParallelLinear(
            CHANNELS, 16, 2, 1, True, quant_config=quantization, prefix="attention.qkv_proj"
        )


class Model(torch.nn.Module):
    """One of each: an embedding, tied to the head or not, a norm, a dense and a sparse linear."""

    def __init__(self, quantization: Any, *, tied: bool) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(WORDS, CHANNELS, quant_config=quantization)
        self.norm = RMSNorm(CHANNELS)
        self.attention = Attention(quantization)
        self.out = ReplicatedLinear(
            CHANNELS, 16, bias=False, quant_config=quantization, prefix="out"
        )
        self.lm_head = ParallelLMHead(WORDS, CHANNELS, quant_config=quantization)
        if tied:
            self.lm_head = self.lm_head.tie_weights(self.embed)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parts = {f".{part}_proj": (".qkv_proj", part) for part in "qkv"}
        mapper = WeightsMapper(orig_to_new_stacked=parts)
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)


@pytest.fixture(autouse=True)
def one_rank(vllm_config: VllmConfig, on_rank: Any) -> None:
    model_loader.install()


def tensors() -> dict[str, Tensor]:
    found = {f"{name}.weight": torch.ones(n, CHANNELS) for name, n in zip(QKV, ROWS, strict=True)}
    found |= {f"{name}.bias": torch.ones(n) for name, n in zip(QKV, ROWS, strict=True)}
    found |= {f"out.{kind}": tensor for kind, tensor in sparse_module(16, CHANNELS).tensors.items()}
    found["norm.weight"] = torch.ones(CHANNELS)
    found["embed.weight"] = found["lm_head.weight"] = torch.ones(WORDS, CHANNELS)
    return found


def load(
    checkpoint: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    *,
    tied: bool = False,
    quantization: str | None = "permllm",
    **options: Any,
) -> None:
    """What vLLM does between building a model and serving it."""
    sparse = config(ignore=QKV) if quantization else None
    model = Model(sparse, tied=tied)
    loader = get_model_loader(LoadConfig(model_loader_extra_config=options))

    def weights(*_: object) -> Iterator[tuple[str, Tensor]]:
        yield from checkpoint.items()

    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", weights)
    described = SimpleNamespace(
        quantization=quantization, is_moe=False, multimodal_config=None, runner_type="generate"
    )
    loader.load_weights(model, described)
    for layer in (model.attention.qkv_proj, model.out):
        layer.quant_method.process_weights_after_loading(layer)


def refusal(checkpoint: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        load(checkpoint, monkeypatch, **options)
    return str(error.value)


@pytest.mark.parametrize("tied", [False, True])
def test_a_whole_checkpoint_is_loaded(monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    checkpoint = tensors()
    load(checkpoint, monkeypatch, tied=tied)
    if tied:
        del checkpoint["lm_head.weight"]
        load(checkpoint, monkeypatch, tied=tied)


@pytest.mark.parametrize("name", sorted(tensors()))
def test_every_tensor_is_needed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    checkpoint = tensors()
    del checkpoint[name]
    message = refusal(checkpoint, monkeypatch)
    assert message.startswith(f"the checkpoint has no {name}, but ")
    assert "copy it again, or run `permllm-offline prune` again" in message


def test_the_names_of_a_whole_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM knows one weight, the checkpoint three."""
    weights = [f"{name}.weight" for name in QKV]
    checkpoint = {name: tensor for name, tensor in tensors().items() if name not in weights}
    assert f"has no {', '.join(weights)}, but" in refusal(checkpoint, monkeypatch)


def test_a_tied_head_needs_the_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tensors()
    del checkpoint["embed.weight"], checkpoint["lm_head.weight"]
    assert "has no embed.weight, but" in refusal(checkpoint, monkeypatch, tied=True)


def test_a_bias_that_the_model_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would drop it without a word."""
    message = refusal({**tensors(), "out.bias": torch.ones(16)}, monkeypatch)
    assert message.startswith("out.bias is in the checkpoint, but ")


def save(checkpoint: dict[str, Tensor], directory: Path) -> None:
    alone = {name: tensor.clone() for name, tensor in checkpoint.items()}
    save_file(alone, directory / "model.safetensors")


def reloaded(
    first: dict[str, Tensor], then: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, path: str
) -> Iterable[tuple[str, Tensor]]:
    """What comes through where `then` is loaded into a model of `first`."""
    model = Model(config(ignore=QKV), tied=False)
    described = SimpleNamespace(
        quantization="permllm", is_moe=False, multimodal_config=None, runner_type="generate"
    )
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *_: iter(first.items()))
    get_model_loader(LoadConfig()).load_weights(model, described)
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *_: iter(then.items()))
    return get_model_loader(LoadConfig()).get_all_weights(SimpleNamespace(model=path), model)


def test_a_running_model_takes_a_whole_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(tensors(), tmp_path)
    for path in (str(tmp_path), "name/on-the-hub"):
        assert dict(reloaded(tensors(), tensors(), monkeypatch, path)).keys() == tensors().keys()


def test_a_running_model_refuses_a_part_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = tensors()
    del part["norm.weight"]
    save(part, tmp_path)
    with pytest.raises(CheckpointError, match=r"have no norm\.weight, which the model was loaded"):
        reloaded(tensors(), part, monkeypatch, str(tmp_path))  # no tensor was asked for
    del part["embed.weight"]
    weights = reloaded(tensors(), part, monkeypatch, "name/on-the-hub")
    with pytest.raises(CheckpointError, match=r"have no embed\.weight, nor 1 other tensors, which"):
        list(weights)


def test_a_running_model_takes_no_pickles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")
    with pytest.raises(CheckpointError):
        reloaded(tensors(), tensors(), monkeypatch, str(tmp_path))


def test_vllms_option_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tensors()
    del checkpoint["norm.weight"]
    load(checkpoint, monkeypatch, enable_weights_track=False)


def test_a_dense_model_is_loaded_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UnquantizedLinearMethod, "process_weights_after_loading", lambda *_: None)
    checkpoint = {n: t for n, t in tensors().items() if not n.startswith("out.")}
    checkpoint["out.weight"] = torch.ones(16, CHANNELS)
    load(checkpoint, monkeypatch, quantization=None)
    del checkpoint["norm.weight"]
    with pytest.raises(ValueError, match="not initialized from checkpoint") as error:
        load(checkpoint, monkeypatch, quantization=None)
    assert not isinstance(error.value, CheckpointError)


def test_tensors_are_read_without_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As vLLM does to load new weights into a running model."""
    monkeypatch.setattr(DefaultModelLoader, "get_all_weights", lambda *_: iter(tensors().items()))
    loader: Any = get_model_loader(LoadConfig())
    assert dict(loader.get_all_weights(None, None)).keys() == tensors().keys()


@pytest.mark.parametrize("quantization", ["permllm", None])
def test_the_loader_of_object_stores_sees_to_heads(
    quantization: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MODEL_LOADERS["runai_streamer"] is model_loader.StreamingLoader
    loader = object.__new__(model_loader.StreamingLoader)  # what reads the stores is not here
    loaded: list[Any] = []
    monkeypatch.setattr(
        model_loader.STREAMED, "load_weights", lambda self, *given: loaded.append(given)
    )
    model = torch.nn.ModuleList([VocabParallelEmbedding(WORDS, CHANNELS)])
    described = SimpleNamespace(quantization=quantization, runner_type="generate")
    loader.load_weights(model, described)
    assert loaded == [(model, described)]
    method: Any = model[0].quant_method
    assert isinstance(method, HeadMethod) == (quantization is not None)
    assert getattr(method, "multiplies", False) == (quantization is not None)


def test_other_loaders_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    dummy = get_model_loader(LoadConfig(load_format="dummy"))
    assert type(dummy).__module__.startswith("vllm.")
    for load_format in ("auto", "hf", "safetensors"):
        loader = get_model_loader(LoadConfig(load_format=load_format))
        assert type(loader) is model_loader.CompleteModelLoader
