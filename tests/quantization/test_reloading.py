"""vLLM can load new weights into a running model: the layer takes them like the first ones."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

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
