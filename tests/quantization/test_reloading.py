"""vLLM can load new weights into a running model: the layer takes them like the first ones."""

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from permllm_vllm.checkpoint.errors import CheckpointError
from tests.quantization.sparse_modules import config, load, packed_dense, permutation, sparse_module

NAMES = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]


def test_reloading(on_rank: Callable[[int, int], None]) -> None:
    layer = QKVParallelLinear(
        128, 16, 1, 1, False, quant_config=config(NAMES), prefix="model.layers.0.self_attn.qkv_proj"
    )
    record_metadata_for_reloading(layer)

    def modules(seed: int) -> dict[str, object]:
        local = permutation(128, seed=seed)
        return {s: sparse_module(16, 128, local=local, seed=seed + ord(s)) for s in "qkv"}

    for shard, module in modules(1).items():
        load(layer, module, shard)
    packed_dense(layer)
    storage = layer.weight_packed.data_ptr()

    second = modules(2)
    initialize_layerwise_reload(layer)
    for shard, module in second.items():
        load(layer, module, shard)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    expected = torch.cat([second[shard].dense for shard in "qkv"])
    torch.testing.assert_close(layer.weight_packed.data, expected, rtol=0, atol=0)
    assert layer.weight_packed.data_ptr() == storage  # captured graphs keep their addresses


def test_reloading_where_a_folded_permutation_comes_last(
    on_rank: Callable[[int, int], None],
) -> None:
    name = "model.layers.0.mlp.down_proj"
    layer = RowParallelLinear(
        128, 32, False, quant_config=config(folded=[name]), prefix=name, params_dtype=torch.float32
    )
    record_metadata_for_reloading(layer)
    for seed in (1, 2):
        module = sparse_module(
            32, 128, local=permutation(128, seed=seed), kind="folded_permutation", seed=seed
        )
        assert list(module.tensors)[-1] == "folded_permutation"
        if seed == 2:
            initialize_layerwise_reload(layer)
        load(layer, module)
        if seed == 1:
            packed_dense(layer)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    torch.testing.assert_close(layer.weight_packed.data, module.dense, rtol=0, atol=0)


def test_reloading_with_a_bias(on_rank: Callable[[int, int], None]) -> None:
    layer = QKVParallelLinear(
        128, 16, 1, 1, True, quant_config=config(), prefix="model.layers.0.self_attn.qkv_proj"
    )
    record_metadata_for_reloading(layer)
    for seed in (1, 2):
        modules = {s: sparse_module(16, 128, seed=seed + ord(s)) for s in "qkv"}
        biases = {s: torch.full((16,), float(seed + ord(s))) for s in "qkv"}
        if seed == 2:
            initialize_layerwise_reload(layer)
        for shard, module in modules.items():
            load(layer, module, shard)
            layer.bias.weight_loader(layer.bias, biases[shard], shard)
        if seed == 1:
            packed_dense(layer)
            continue
        finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
        expected = torch.cat([modules[shard].dense for shard in "qkv"])
        torch.testing.assert_close(layer.weight_packed.data, expected, rtol=0, atol=0)
        torch.testing.assert_close(layer.bias.data, torch.cat(list(biases.values())))


def test_a_layer_that_gets_no_new_weights_stays_what_it_is(
    on_rank: Callable[[int, int], None],
) -> None:
    """As where some layers of a model are loaded anew, and this one is none of them."""
    name = "model.layers.0.self_attn.o_proj"
    layer = RowParallelLinear(
        128, 32, False, quant_config=config(), prefix=name, params_dtype=torch.float32
    )
    record_metadata_for_reloading(layer)
    load(layer, sparse_module(32, 128))
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(3, 128)
    before = layer(x)[0]
    initialize_layerwise_reload(layer)
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
    assert torch.equal(layer(x)[0], before)


def test_new_weights_past_vllms_ways_of_reloading_are_refused_as_such(
    on_rank: Callable[[int, int], None],
) -> None:
    """vLLM gives the loader the layer itself, where that no longer has what is to be loaded."""
    layer = QKVParallelLinear(
        128, 16, 1, 1, True, quant_config=config(), prefix="model.layers.0.self_attn.qkv_proj"
    )
    for shard in "qkv":
        load(layer, sparse_module(16, 128), shard)
        layer.bias.weight_loader(layer.bias, torch.zeros(16), shard)
    packed_dense(layer)
    weight: Any = torch.zeros(16, 128)
    weight.shard_id = "q"
    with pytest.raises(CheckpointError, match=r"q_proj.*collective_rpc\('reload_weights'\)"):
        list(layer.load_weights([("weight", weight)]))


def test_reloading_a_dense_layer(on_rank: Callable[[int, int], None]) -> None:
    name = "model.layers.0.self_attn.o_proj"
    layer = RowParallelLinear(64, 32, True, quant_config=config(ignore=[name]), prefix=name)
    record_metadata_for_reloading(layer)
    x = torch.randn(3, 64)
    for seed in (1, 2):
        weight = torch.randn((32, 64), generator=torch.Generator().manual_seed(seed))
        bias = torch.full((32,), float(seed))
        if seed == 2:
            initialize_layerwise_reload(layer)
        layer.weight.weight_loader(layer.weight, weight)
        layer.bias.weight_loader(layer.bias, bias)
        if seed == 1:
            layer.quant_method.process_weights_after_loading(layer)
        else:
            finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.float32))
        torch.testing.assert_close(layer(x)[0], functional.linear(x, weight, bias))


def test_what_reloading_keeps_holds_no_layer(on_rank: Callable[[int, int], None]) -> None:
    name = "model.layers.0.self_attn.o_proj"
    layers = [
        RowParallelLinear(64, 32, False, quant_config=config(ignore=ignored), prefix=name)
        for ignored in ([], [name])
    ]
    for layer in layers:
        record_metadata_for_reloading(layer)
    references = [weakref.ref(layer) for layer in layers]
    del layer, layers
    gc.collect()
    assert [reference() for reference in references] == [None, None]
