"""A model of the hub: what is fetched of it; a device: whether it can hold a tensor."""

import json
import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import GatedRepoError
from transformers import PreTrainedModel

from permllm_offline.api import prune
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import load_model, load_served, open_source, parse_device
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.prepared import open_prunable
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_vllm.checkpoint.errors import CheckpointError
from tests.offline.tiny_models import save_tokenizer, tiny_llama, tiny_model

COMMIT = "0123456789" * 4


class PretendedHub:
    """A repository, of which `snapshot_download` copies what its patterns match."""

    def __init__(self, repository: Path, cache: Path) -> None:
        self.repository, self.snapshot = repository, cache / "snapshots" / COMMIT
        self.revisions: list[str | None] = []

    def download(self, name: str, *, allow_patterns: Sequence[str], revision: str | None) -> str:
        assert name == "someone/tiny"
        self.revisions.append(revision)
        for file in self.repository.rglob("*"):
            path = str(file.relative_to(self.repository))
            if file.is_file() and any(fnmatch(path, pattern) for pattern in allow_patterns):
                (self.snapshot / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, self.snapshot / path)
        return str(self.snapshot)

    def fetched(self) -> set[str]:
        files = self.snapshot.rglob("*.safetensors")
        return {str(file.relative_to(self.snapshot)) for file in files}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendedHub:
    hub = PretendedHub(tmp_path / "repository", tmp_path / "cache")
    (hub.repository / "original").mkdir(parents=True)
    for name in ("consolidated.safetensors", "original/model.safetensors"):
        (hub.repository / name).write_bytes(b"gigabytes that nobody reads")
    save_tokenizer(hub.repository)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    return hub


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_that_is_declared_nowhere_is_that_of_the_weights(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_source(str(tmp_path)).dtype == dtype


def test_of_one_weight_file_no_other_is_fetched(hub: PretendedHub) -> None:
    tiny_llama().save_pretrained(hub.repository)
    source = open_source("someone/tiny")
    assert hub.fetched() == {"model.safetensors"}
    assert hub.revisions == [None, COMMIT]
    load_tokenizer(source)
    load_model(source, torch.float32, torch.device("cpu"))


def test_of_shards_those_of_the_index_are_fetched(hub: PretendedHub) -> None:
    tiny_llama().save_pretrained(hub.repository, max_shard_size="500KB")
    index = json.loads((hub.repository / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    source = open_source("someone/tiny")
    assert hub.fetched() == shards
    assert {file.name for file in source.weight_files()} == shards
    load_model(source, torch.float32, torch.device("cpu"))


def test_an_index_that_names_files_elsewhere_is_refused(hub: PretendedHub) -> None:
    tiny_llama().save_pretrained(hub.repository)
    index = {"weight_map": {"lm_head.weight": "../other/model.safetensors"}}
    (hub.repository / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="plain name"):
        open_source("someone/tiny")
    assert hub.fetched() == set()


def test_a_folder_with_two_sets_of_weights_is_refused(tmp_path: Path) -> None:
    """As `save_pretrained` leaves it that wrote several files first, and then one."""
    tiny_llama().save_pretrained(tmp_path, max_shard_size="500KB")
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="remove the older one"):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("said", "asked", "message"),
    [
        ({"model_type": "bloom"}, {}, "'bloom' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, {}, "in a form that is not read"),
        ({}, {"method": "wanda"}, "'wanda' needs calibration text"),
        ({}, {"device": "quantum"}, "'quantum' cannot be used"),
    ],
    ids=["family", "quantized", "text", "device"],
)
def test_what_cannot_be_pruned_is_refused_before_its_weights_are_fetched(
    said: dict[str, Any], asked: dict[str, Any], message: str, hub: PretendedHub
) -> None:
    tiny_llama().save_pretrained(hub.repository)
    config = json.loads((hub.repository / "config.json").read_text())
    (hub.repository / "config.json").write_text(json.dumps({**config, **said}))
    with pytest.raises(OfflineError, match=message):
        open_prunable(make_recipe({"model": "someone/tiny", "method": "magnitude", **asked}))
    assert hub.fetched() == set()


def refused(monkeypatch: pytest.MonkeyPatch, error: Exception) -> str:
    """What is said where the hub answers with an error."""

    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(OfflineError) as raised:
        open_source("someone/tiny")
    return str(raised.value)


def test_a_gated_model_asks_for_its_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    response = httpx.Response(401, request=httpx.Request("GET", "https://hub.invalid"))
    said = refused(monkeypatch, GatedRepoError("401 Client Error.\nmore", response=response))
    assert "(GatedRepoError: 401 Client Error.)" in said
    assert "Accept the model's licence" in said
    assert "`hf auth login`" in said
    assert "Check the name" in refused(monkeypatch, OSError("no network"))


def test_the_cap_of_attention_scores_is_computed(tmp_path: Path) -> None:
    model = tiny_model("gemma2", attn_logit_softcapping=0.05)
    model.save_pretrained(tmp_path)
    tokens = torch.arange(3, 19).view(1, -1)
    model.set_attn_implementation("eager")
    loaded = load_model(open_source(str(tmp_path)), torch.float32, torch.device("cpu"))
    with torch.no_grad():
        expected = model.float()(tokens).logits
        assert torch.equal(loaded(tokens).logits, expected)
        uncapped = tiny_model("gemma2", attn_logit_softcapping=None).float()
        uncapped.load_state_dict(model.state_dict())
        assert not torch.allclose(uncapped(tokens).logits, expected, rtol=1e-3)  # it is felt here


def test_layers_are_never_those_of_kernels_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    tiny_llama().save_pretrained(dense)
    prune(str(dense), sparse, method="magnitude")
    given = []
    load = PreTrainedModel.from_pretrained.__func__

    def watched(kind: type[PreTrainedModel], *arguments: Any, **options: Any) -> Any:
        given.append(options.get("use_kernels"))
        return load(kind, *arguments, **options)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(watched))
    for directory in (dense, sparse):
        load_served(open_source(str(directory)), torch.float32, torch.device("cpu"))
    assert given == [False, False]


@pytest.mark.parametrize("model_type", ["llama", "opt", "gemma3_text"])
def test_a_tokenizer_knows_the_positions_of_its_model(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type, max_position_embeddings=24).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_tokenizer(open_source(str(tmp_path))).positions == 24


@pytest.mark.parametrize("name", ["meta", "quantum", "cuda:99"])
def test_a_device_that_holds_no_tensor_is_refused(name: str) -> None:
    with pytest.raises(OfflineError, match=f"device '{name}' cannot be used .*Give cpu"):
        parse_device(name)
    assert parse_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize(
    ("folder", "commit"),
    [
        ("models--me--m/snapshots/" + "0a" * 20, "0a" * 20),
        ("models--me--m/snapshots/main", None),
        ("mine/" + "0a" * 20, None),
    ],
)
def test_a_model_of_the_hub_knows_its_commit(
    folder: str, commit: str | None, tmp_path: Path
) -> None:
    (tmp_path / folder).mkdir(parents=True)
    tiny_llama().config.save_pretrained(tmp_path / folder)
    assert open_source(str(tmp_path / folder)).commit == commit
