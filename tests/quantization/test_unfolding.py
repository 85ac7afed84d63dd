"""With LoRA enabled, layers compute in the channel order from before the folding."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from permllm_vllm.checkpoint.errors import CheckpointError
from tests.quantization.sparse_modules import (
    BLOCK,
    SparseModule,
    config,
    load,
    packed_dense,
    permutation,
    sparse_module,
)

OnRank = Callable[[int, int], None]
HIDDEN, HEAD, QUERY_HEADS = 64, 64, 4
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
QKV = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
OUTPUT, DOWN = f"{ATTENTION}.o_proj", f"{MLP}.down_proj"
GATE_UP = [f"{MLP}.gate", f"{MLP}.up"]


@pytest.fixture(autouse=True)
def adapters(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())


def original_order(local: Tensor) -> list[int]:
    """For every channel of the model's own order, the place that folding moved it to."""
    places = [0] * local.numel()
    for place, channel in enumerate(local.tolist()):
        places[place // BLOCK * BLOCK + channel] = place
    return places


def qkv(quantization: Any, kv_heads: int, bias: bool = False) -> QKVParallelLinear:
    return QKVParallelLinear(
        HIDDEN,
        HEAD,
        QUERY_HEADS,
        kv_heads,
        bias,
        quant_config=quantization,
        prefix=f"{ATTENTION}.qkv_proj",
    )


def row_parallel(quantization: Any, channels: int, prefix: str) -> RowParallelLinear:
    return RowParallelLinear(channels, 8, bias=False, quant_config=quantization, prefix=prefix)


def folded_module(rows: int, local: Tensor) -> SparseModule:
    return sparse_module(rows, local.numel(), local=local, kind="folded_permutation")


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.data, expected, rtol=0, atol=0)


def unpermuted(module: SparseModule, local: Tensor) -> Tensor:
    return module.dense[:, original_order(local)]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 3)])
def test_attention(on_rank: OnRank, kv_heads: int, size: int, rank: int) -> None:
    """Rows of `v` move back head by head, on a rank that holds a copy of a KV head too."""
    on_rank(rank, size)
    quantization = config(QKV, folded=[OUTPUT])
    layer, output = qkv(quantization, kv_heads, bias=True), row_parallel(quantization, 256, OUTPUT)
    value = permutation(kv_heads * HEAD)
    tied = value.view(kv_heads, HEAD).repeat_interleave(QUERY_HEADS // kv_heads, 0).flatten()
    local = permutation(HIDDEN, seed=9)
    parts = {
        shard: sparse_module(heads * HEAD, HIDDEN, local=local, seed=ord(shard))
        for shard, heads in (("q", QUERY_HEADS), ("k", kv_heads), ("v", kv_heads))
    }
    biases = {s: torch.arange(float(m.dense.shape[0])) for s, m in parts.items()}
    for shard, module in parts.items():
        load(layer, module, shard)
        layer.bias.weight_loader(layer.bias, biases[shard], shard)
    module = folded_module(8, tied)
    load(output, module)

    copies = max(size // kv_heads, 1)
    order = original_order(value)

    def slices(of: Callable[[str], Tensor]) -> Tensor:
        kv = [of("k"), of("v")[order]]
        kv = [part.chunk(size // copies)[rank // copies] for part in kv]
        return torch.cat([of("q").chunk(size)[rank], *kv])

    assert_equal(packed_dense(layer), slices(lambda shard: parts[shard].dense))
    assert_equal(layer.bias, slices(lambda shard: biases[shard]))
    assert_equal(packed_dense(output), unpermuted(module, tied).chunk(size, dim=1)[rank])


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1)])
def test_mlp(on_rank: OnRank, size: int, rank: int) -> None:
    on_rank(rank, size)
    channels = 4 * BLOCK
    quantization = config(GATE_UP, folded=[DOWN])
    layer = MergedColumnParallelLinear(
        HIDDEN, [channels] * 2, bias=False, quant_config=quantization, prefix=f"{MLP}.gate_up_proj"
    )
    down = row_parallel(quantization, channels, DOWN)
    folded = permutation(channels)
    parts = [sparse_module(channels, HIDDEN, local=permutation(HIDDEN), seed=s) for s in (1, 2)]
    for shard, part in enumerate(parts):
        load(layer, part, shard)
    module = folded_module(8, folded)
    load(down, module)
    rows = [part.dense[original_order(folded)].chunk(size)[rank] for part in parts]
    assert_equal(packed_dense(layer), torch.cat(rows))
    assert_equal(packed_dense(down), unpermuted(module, folded).chunk(size, dim=1)[rank])


@pytest.mark.parametrize("first", ["folded", "preceding"])
def test_either_layer_may_be_processed_first(on_rank: OnRank, first: str) -> None:
    """vLLM's class for models of Transformers has `o_proj` before `qkv_proj`."""
    quantization = config(folded=[DOWN])
    layer = ReplicatedLinear(
        HIDDEN, BLOCK, bias=False, quant_config=quantization, prefix=f"{MLP}.fc1"
    )
    down = row_parallel(quantization, BLOCK, DOWN)
    before, folded = sparse_module(BLOCK, HIDDEN), permutation(BLOCK)
    after = folded_module(8, folded)
    load(layer, before)
    load(down, after)
    if first == "folded":
        restored, moved = packed_dense(down), packed_dense(layer)
    else:
        moved, restored = packed_dense(layer), packed_dense(down)
    assert_equal(moved, before.dense[original_order(folded)])
    assert_equal(restored, unpermuted(after, folded))


def test_of_three_parts_none_is_taken_for_the_values(on_rank: OnRank) -> None:
    quantization = config(QKV, folded=[OUTPUT])
    layer = MergedColumnParallelLinear(
        HIDDEN, [256] * 3, bias=False, quant_config=quantization, prefix=f"{ATTENTION}.qkv_proj"
    )
    output = row_parallel(quantization, 256, OUTPUT)
    for shard in range(3):
        load(layer, sparse_module(256, HIDDEN, local=permutation(HIDDEN)), shard)
    load(output, folded_module(8, permutation(256)))
    assert "qkv_proj has 768 rows" in refused([layer])


def test_a_draft_keeps_its_folds(
    on_rank: OnRank, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM adapts no draft, though its configuration has the target's LoRA."""
    draft = SimpleNamespace()
    target = vllm_config.model_config
    speculative = SimpleNamespace(draft_model_config=draft, target_model_config=target)
    monkeypatch.setattr(vllm_config, "speculative_config", speculative)
    down: Any = row_parallel(config(folded=[DOWN]), BLOCK, DOWN)
    assert down.quant_method.unfolding is not None
    monkeypatch.setattr(vllm_config, "model_config", draft)
    down = row_parallel(config(folded=[DOWN]), BLOCK, DOWN)
    assert down.quant_method.unfolding is None


def test_what_drafts_by_n_grams_is_no_draft_model(
    on_rank: OnRank, vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then vLLM has the model itself as the draft, and adapts it."""
    model = SimpleNamespace()
    speculative = SimpleNamespace(draft_model_config=model, target_model_config=model)
    monkeypatch.setattr(vllm_config, "speculative_config", speculative)
    monkeypatch.setattr(vllm_config, "model_config", model)
    down: Any = row_parallel(config(folded=[DOWN]), BLOCK, DOWN)
    assert down.quant_method.unfolding is not None


def test_scales_move_with_their_rows(on_rank: OnRank) -> None:
    quantization = config(folded=[DOWN], value_dtype="int8")
    layer = ReplicatedLinear(
        HIDDEN, BLOCK, bias=False, quant_config=quantization, prefix=f"{MLP}.fc1"
    )
    down = row_parallel(quantization, BLOCK, DOWN)
    scale, folded = torch.linspace(0.5, 2.0, BLOCK), permutation(BLOCK)
    first, second = sparse_module(BLOCK, HIDDEN), folded_module(8, folded)
    for part, module, factor in ((layer, first, scale), (down, second, torch.ones(8))):
        values = (10 * module.tensors["weight_packed"]).round().to(torch.int8)
        tensors = {**module.tensors, "weight_packed": values, "weight_scale": factor}
        load(part, SparseModule(tensors, module.dense))
    expected = (10 * first.dense).round() * scale.unsqueeze(1)
    assert_equal(packed_dense(layer), expected[original_order(folded)])


def load_attention(quantization: Any, tied: Tensor, value_heads: int) -> list[Any]:
    layer, output = qkv(quantization, value_heads), row_parallel(quantization, 256, OUTPUT)
    for shard, heads in (("q", QUERY_HEADS), ("k", value_heads), ("v", value_heads)):
        load(layer, sparse_module(heads * HEAD, HIDDEN, local=permutation(HIDDEN)), shard)
    load(output, folded_module(8, tied))
    return [layer, output]


def test_query_heads_that_disagree(on_rank: OnRank) -> None:
    layer, _ = load_attention(config(QKV, folded=[OUTPUT]), permutation(256), value_heads=2)
    with pytest.raises(CheckpointError, match=r"o_proj\.folded_permutation differs between query"):
        packed_dense(layer)


def refused(layers: Sequence[Any]) -> str:
    *others, last = layers
    for layer in others:
        layer.quant_method.process_weights_after_loading(layer)
    with pytest.raises(NotImplementedError, match="LoRA was enabled, but") as error:
        last.quant_method.process_weights_after_loading(last)
    assert "Serve without --enable-lora, or merge the adapter" in str(error.value)
    return str(error.value)


def test_a_dense_layer_before_a_folded_one(on_rank: OnRank) -> None:
    quantization = config(ignore=QKV, folded=[OUTPUT])
    qkv(quantization, 4)
    output = row_parallel(quantization, 256, OUTPUT)
    load(output, folded_module(8, permutation(256)))
    assert f"{OUTPUT} has a folded permutation" in refused([output])


def test_no_layer_before_a_folded_one(on_rank: OnRank) -> None:
    """Its rows moved in a layer that vLLM builds as none of its own."""
    output = row_parallel(config(folded=[OUTPUT]), 256, OUTPUT)
    load(output, folded_module(8, permutation(256)))
    assert f"{OUTPUT} has a folded permutation" in refused([output])


def test_several_layers_before_a_folded_one(on_rank: OnRank) -> None:
    """Nothing says which of them had its rows moved."""
    quantization = config(folded=[DOWN])
    layers = [
        ReplicatedLinear(HIDDEN, 64, bias=False, quant_config=quantization, prefix=f"{MLP}.{name}")
        for name in ("gate", "other")
    ]
    down = row_parallel(quantization, 64, DOWN)
    for layer in layers:
        load(layer, sparse_module(64, HIDDEN))
    load(down, folded_module(8, permutation(64)))
    assert DOWN in refused(layers[:1])


def test_a_layer_of_another_size(on_rank: OnRank) -> None:
    quantization = config(folded=[DOWN])
    layer = ReplicatedLinear(
        HIDDEN, 128, bias=False, quant_config=quantization, prefix=f"{MLP}.fc1"
    )
    down = row_parallel(quantization, 64, DOWN)
    load(layer, sparse_module(128, HIDDEN))
    load(down, folded_module(8, permutation(64)))
    assert "fc1 has 128 rows" in refused([layer])


def test_ranks_cut_at_block_edges(on_rank: OnRank) -> None:
    """A folded layer is one that is permuted at run time then."""
    on_rank(0, 8)
    with pytest.raises(ValueError, match="1376 of its 11008 input channels"):
        row_parallel(config(folded=[DOWN]), 11008, DOWN)
