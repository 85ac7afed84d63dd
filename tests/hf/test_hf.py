"""`AutoModelForCausalLM.from_pretrained` on a permllm checkpoint."""

import json
import logging
import re
from copy import deepcopy
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

import permllm_offline
import permllm_vllm.hf  # noqa: F401  (registers the method)
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_vllm import ops
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.hf import SparseLinear
from tests.serving.checkpoints import Twins, prune, random_mixtral

UP = "model.layers.1.mlp.up_proj"


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: object) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens).logits.float()


def sparse_layers(model: nn.Module) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


def test_float32_is_the_dense_twin_with_the_same_tokens(twins: Twins, tokens: Tensor) -> None:
    sparse, dense = load(twins.sparse), load(twins.dense)
    assert len(sparse_layers(sparse)) == 14
    expected = logits(dense, tokens)
    assert (logits(sparse, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()
    continued = [m.generate(tokens, max_new_tokens=12, do_sample=False) for m in (sparse, dense)]
    assert torch.equal(*continued)


@pytest.mark.parametrize("pattern", ["4:8", "8:16", "32:64"])
def test_every_pattern_is_its_dense_twin(
    pattern: Literal["4:8", "8:16", "32:64"], twins: Twins, tokens: Tensor, tmp_path: Path
) -> None:
    sparse, dense = tmp_path / "sparse", tmp_path / "dense"
    permllm_offline.prune(
        twins.parent, sparse, method="magnitude", pattern=pattern, dtype="float32"
    )
    convert_to_dense(str(sparse), dense)
    model, expected = load(sparse), logits(load(dense), tokens)
    assert f"pattern={pattern}" in repr(sparse_layers(model)[0])
    assert (logits(model, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_bfloat16_goes_through_the_compiled_kernel(twins: Twins, tokens: Tensor) -> None:
    if ops.missing_reason:
        pytest.skip(ops.missing_reason)
    sparse, dense = load(twins.sparse, torch.bfloat16), load(twins.dense, torch.bfloat16)
    exact = logits(load(twins.dense), tokens)
    found, expected = logits(sparse, tokens), logits(dense, tokens)
    assert "backend=cpu" in repr(sparse_layers(sparse)[0])
    rounding = (expected - exact).abs().max()
    assert 0 < (found - exact).abs().max() < 2 * rounding


def test_tied_embeddings_stay_tied(twins: Twins) -> None:
    model = load(twins.sparse)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bare_model_finds_the_layers(twins: Twins, tokens: Tensor) -> None:
    sparse = AutoModel.from_pretrained(twins.sparse, dtype=torch.float32)
    dense = AutoModel.from_pretrained(twins.dense, dtype=torch.float32)
    assert len(sparse_layers(sparse)) == 14
    with torch.no_grad():
        expected = dense(tokens).last_hidden_state
        difference = sparse(tokens).last_hidden_state - expected
    assert difference.abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["auto", torch.float32])
def test_saving_writes_what_was_read(
    twins: Twins, tokens: Tensor, tmp_path: Path, dtype: object
) -> None:
    model = AutoModelForCausalLM.from_pretrained(twins.sparse, dtype=dtype)
    logits(model, tokens)  # packed by now, which must not be saved
    model.save_pretrained(tmp_path / "saved")
    before = load_file(twins.sparse / "model.safetensors")
    after = load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kept = dtype == "auto" or name.rpartition(".")[2] not in ("weight", "bias")
        assert torch.equal(after[name], tensor)
        assert (after[name].dtype == tensor.dtype) == kept
    configs = [
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (twins.sparse, tmp_path / "saved")
    ]
    assert configs[0] == configs[1]
    assert torch.equal(logits(load(tmp_path / "saved"), tokens), logits(load(twins.sparse), tokens))


def test_conversion_keeps_the_stored_dtypes_and_packs_again(twins: Twins, tokens: Tensor) -> None:
    model = load(twins.sparse, torch.bfloat16)
    logits(model, tokens)
    converted = deepcopy(model).to(torch.float32)
    layer = sparse_layers(converted)[0]
    assert layer.weight_packed.dtype == torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert torch.equal(logits(converted, tokens), logits(load(twins.sparse), tokens))


def test_loading_other_weights_packs_again(twins: Twins, sparse_copy: Path, tokens: Tensor) -> None:
    """Those of a model whose two decoder layers have changed places."""
    file = sparse_copy / "model.safetensors"

    def swapped(name: str) -> str:
        return re.sub(r"layers\.([01])\.", lambda found: f"layers.{1 - int(found[1])}.", name)

    tensors = {swapped(name): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    model = load(twins.sparse)
    before = logits(model, tokens)
    model.load_state_dict(load(sparse_copy).state_dict())
    expected = logits(load(sparse_copy), tokens)
    assert torch.equal(logits(model, tokens), expected)
    assert not torch.allclose(before, expected, rtol=0.1)


def test_device_map(twins: Twins, tokens: Tensor) -> None:
    expected = logits(load(twins.sparse), tokens)
    for device_map in ("cpu", "auto", {"": "cpu"}):
        model = load(twins.sparse, device_map=device_map)
        assert torch.equal(logits(model, tokens), expected)


def test_layers_on_disk_come_when_they_are_needed(
    twins: Twins, tokens: Tensor, tmp_path: Path
) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    for offload_buffers in (False, True):
        model = load(
            twins.sparse,
            device_map=device_map,
            offload_folder=tmp_path / str(offload_buffers),
            offload_buffers=offload_buffers,
        )
        assert torch.equal(logits(model, tokens), logits(load(twins.sparse), tokens))


def test_activations_of_another_width_are_refused(twins: Twins) -> None:
    layer = load(twins.sparse).get_submodule(UP)
    with pytest.raises(RuntimeError, match=rf"{UP} got activations of 24 channels; it multiplies"):
        layer(torch.zeros(2, 24))


def test_damage_that_comes_after_loading_is_refused(twins: Twins, tokens: Tensor) -> None:
    model = load(twins.sparse)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state[f"{UP}.weight_mask"][0, 0] = 0b11111111
    model.load_state_dict(state)
    with pytest.raises(CheckpointError, match="4 bits in row 0, group 0"):
        model(tokens)


def test_training_through_a_sparse_layer_is_refused(twins: Twins, tokens: Tensor) -> None:
    model = load(twins.sparse)
    assert model(tokens).logits.requires_grad  # a forward pass outside no_grad is fine
    with pytest.raises(RuntimeError, match=r"has no gradient: call model\.dequantize\(\)"):
        model(tokens, labels=tokens).loss.backward()
    model.dequantize()
    model(tokens, labels=tokens).loss.backward()
    assert model.get_input_embeddings().weight.grad.norm() > 0


def test_dequantize_gives_a_plain_model(twins: Twins, tokens: Tensor) -> None:
    model = load(twins.sparse).dequantize()
    assert sparse_layers(model) == []
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    expected = logits(load(twins.dense), tokens)
    assert (logits(model, tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_int8_values_are_scaled(sparse_copy: Path, tokens: Tensor) -> None:
    file = sparse_copy / "model.safetensors"
    tensors = load_file(file)
    dense = load(sparse_copy).dequantize()
    for name in [n for n in tensors if n.endswith("weight_packed")]:
        module = name.removesuffix(".weight_packed")
        values = tensors[name].float()
        scale = values.abs().amax(dim=1) / 127
        tensors[name] = (values / scale[:, None]).round().to(torch.int8)
        tensors[f"{module}.weight_scale"] = scale
        weight = dense.get_submodule(module).weight.data
        weight.copy_((weight / scale[:, None]).round() * scale[:, None])
    save_file(tensors, file, metadata={"format": "pt"})
    set_config(sparse_copy, value_dtype="int8")
    expected = logits(dense, tokens)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = logits(load(sparse_copy, dtype), tokens)
        assert (found - expected).abs().max() < tolerance * expected.abs().max()


def test_int4_values(twins: Twins, tokens: Tensor, tmp_path: Path) -> None:
    """They stay in half a byte, and are saved so."""
    convert_to_sparse(str(twins.sparse), tmp_path / "int4", values="int4")
    convert_to_dense(str(tmp_path / "int4"), tmp_path / "dense")
    model = load(tmp_path / "int4")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    found, rounded = logits(model, tokens), logits(dense, tokens)  # to the checkpoint's dtype
    expected = logits(model.dequantize(), tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert (rounded - expected).abs().max() < 3e-2 * expected.abs().max()
    load(tmp_path / "int4").save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert (saved["format_version"], saved["value_dtype"]) == (2, "int4")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("int4", "saved"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_fallback_is_warned_about_once(
    twins: Twins,
    tokens: Tensor,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("permllm_vllm.backends.fallback_reason", lambda *_, **__: "a test")
    with caplog.at_level(logging.WARNING):
        logits(load(twins.sparse), tokens)
    assert caplog.text.count("sparse layers run on the reference backend") == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_packed_model_compiles_to_one_graph(
    twins: Twins, tokens: Tensor, dtype: torch.dtype
) -> None:
    model = load(twins.sparse, dtype)
    expected = logits(model, tokens)  # packs, which a compiler must not trace
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    assert torch.equal(logits(compiled, tokens), expected)


def set_config(directory: Path, **entries: object) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"].update(entries)
    (directory / "config.json").write_text(json.dumps(config))


def edit(directory: Path, **changes: Tensor | None) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for kind, tensor in changes.items():
        name = f"{UP}.{kind}"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, file, metadata={"format": "pt"})


MASK = torch.full((192, 16), 0b00110011, dtype=torch.uint8)
WRONG = MASK.clone()
WRONG[5, 2] = 0b00110111


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_mask": None}, f"{UP}.weight_mask: found nothing"),
        ({"weight_packed": None}, f"{UP}.weight_packed: found nothing"),
        ({"input_permutation": None}, f"{UP}.input_permutation: found nothing"),
        (dict.fromkeys(("weight_mask", "weight_packed", "input_permutation")), "found nothing"),
        ({"weight": torch.zeros(192, 128)}, f"{UP}.weight: found a second, dense weight"),
        ({"weight_mask": WRONG}, "3 bits in row 5, group 4"),
        ({"weight_mask": MASK[:64].clone()}, "layer of 64 x 128"),
        ({"bias": torch.zeros(192)}, "rule: the configuration makes this a layer without a bias"),
        ({"input_permutation": torch.zeros(128, dtype=torch.uint8)}, "no bijection in block 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_checkpoint_is_refused(
    sparse_copy: Path, change: dict[str, Tensor | None], message: str
) -> None:
    if message.startswith("layer of"):
        values = load_file(sparse_copy / "model.safetensors")[f"{UP}.weight_packed"]
        change = change | {"weight_packed": values[:64].clone()}
    edit(sparse_copy, **change)
    with pytest.raises(CheckpointError, match=message.replace("(", r"\(")):
        load(sparse_copy)


def test_a_layer_that_is_wholly_missing_is_refused(sparse_copy: Path) -> None:
    """The last decoder layer: no other tensor tells that there should be one."""
    file = sparse_copy / "model.safetensors"
    tensors = {n: t for n, t in load_file(file).items() if not n.startswith("model.layers.1.")}
    save_file(tensors, file, metadata={"format": "pt"})
    quantization = json.loads((sparse_copy / "config.json").read_text())["quantization_config"]
    first = {
        key: [name for name in quantization[key] if ".1." not in name]
        for key in ("runtime_permuted", "folded")
    }
    set_config(sparse_copy, **first)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight: found nothing"):
        load(sparse_copy)


def drop(directory: Path, name: str) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "layers.1.input_layernorm.weight", "norm.weight"]
)
def test_a_missing_dense_tensor_is_refused(sparse_copy: Path, name: str) -> None:
    """Transformers would put ones or random numbers in its place; the head is tied to the first."""
    drop(sparse_copy, f"model.{name}")
    for model_class in (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel):
        with pytest.raises(CheckpointError, match=rf"{re.escape(name)}: found nothing"):
            model_class.from_pretrained(sparse_copy)


def test_experts_that_transformers_merges_are_there(tmp_path: Path) -> None:
    """And their names in the checkpoint are not those in the model."""
    parent = random_mixtral(tmp_path / "parent")
    ignore = ["lm_head", r"re:.*\.experts(\..*)?", r"re:.*\.gate"]
    twins = prune(parent, tmp_path, ignore=ignore, experts=False)
    tokens = torch.arange(12)[None]
    dense = load(twins.dense)
    sparse = load(twins.sparse)
    assert len(sparse_layers(sparse)) == 8
    torch.testing.assert_close(logits(sparse, tokens), logits(dense, tokens))
    drop(twins.sparse, "model.layers.1.block_sparse_moe.gate.weight")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.gate\.weight: found nothing"):
        load(twins.sparse)


def test_a_missing_head_that_is_not_tied_is_refused(sparse_copy: Path) -> None:
    config = json.loads((sparse_copy / "config.json").read_text())
    (sparse_copy / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: found nothing"):
        load(sparse_copy)


def test_a_head_that_the_checkpoint_cannot_have_is_new(sparse_copy: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(sparse_copy)
    assert sparse_layers(model)
    assert model.score.weight.isfinite().all()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 3}, r"format_version: found 3.*install a newer permllm-vllm from"),
        ({"new_key": 1}, "does not know this key"),
        ({"pattern": "1:4"}, "pattern '1:4' is not supported"),
    ],
)
def test_an_unknown_configuration_is_refused(
    sparse_copy: Path, entries: dict[str, object], message: str
) -> None:
    set_config(sparse_copy, **entries)
    with pytest.raises(CheckpointError, match=message):
        load(sparse_copy)


def test_a_truncated_file_is_refused(sparse_copy: Path) -> None:
    file = sparse_copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="a whole safetensors file"):
        load(sparse_copy)


def test_shards_are_read_and_doubled_tensors_refused(sparse_copy: Path, tokens: Tensor) -> None:
    expected = logits(load(sparse_copy), tokens)
    file = sparse_copy / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    names = sorted(tensors)
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    halves = [names[::2], names[1::2]]
    for shard, half in zip(files, halves, strict=True):
        save_file({n: tensors[n] for n in half}, sparse_copy / shard, metadata={"format": "pt"})
    weight_map = {n: shard for shard, half in zip(files, halves, strict=True) for n in half}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (sparse_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(logits(load(sparse_copy), tokens), expected)

    doubled = {n: tensors[n] for n in [*halves[1], names[0]]}
    save_file(doubled, sparse_copy / files[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="a second tensor"):
        load(sparse_copy)


def test_a_dense_checkpoint_loads_as_before(twins: Twins) -> None:
    assert sparse_layers(load(twins.dense)) == []
