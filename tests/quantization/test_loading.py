"""Real vLLM layers load the format: every slice exact, on every rank, for every kind of layer."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from permllm_vllm.backends import require_pattern
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.quantization import linear, weight_files
from tests.quantization.sparse_modules import (
    BLOCK,
    SparseModule,
    config,
    int4_module,
    load,
    packed_dense,
    permutation,
    sparse_module,
)

OnRank = Callable[[int, int], None]
HEAD, HIDDEN = 16, 128
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def rows_of(tensor: Tensor, rank: int, size: int) -> Tensor:
    return tensor.chunk(size)[rank]


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.data, expected, rtol=0, atol=0)


def attention_modules(heads: int, kv_heads: int) -> dict[str, SparseModule]:
    local = permutation(HIDDEN)
    return {
        shard: sparse_module(count * HEAD, HIDDEN, local=local, seed=seed)
        for seed, (shard, count) in enumerate(zip("qkv", (heads, kv_heads, kv_heads), strict=True))
    }


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)])
def test_qkv_slices(on_rank: OnRank, size: int, rank: int, kv_heads: int) -> None:
    on_rank(rank, size)
    names = [f"{ATTENTION}.{name}" for name in ("q_proj", "k_proj", "v_proj")]
    layer = QKVParallelLinear(
        HIDDEN, HEAD, 4, kv_heads, False, quant_config=config(names), prefix=f"{ATTENTION}.qkv_proj"
    )
    modules = attention_modules(4, kv_heads)
    for shard in "kvq":  # the order of a checkpoint is not ours to choose
        load(layer, modules[shard], shard)

    copies = max(size // kv_heads, 1)
    kv_slice = (rank // copies, size // copies)

    def expected(pick: Callable[[SparseModule], Tensor]) -> Tensor:
        query = rows_of(pick(modules["q"]), rank, size)
        return torch.cat([query, *(rows_of(pick(modules[s]), *kv_slice) for s in "kv")])

    assert_equal(layer.weight_packed, expected(lambda m: m.tensors["weight_packed"]))
    assert_equal(layer.weight_mask, expected(lambda m: m.tensors["weight_mask"]))
    assert_equal(layer.input_permutation, permutation(HIDDEN).expand(3, -1))
    assert_equal(packed_dense(layer), expected(lambda m: m.dense))


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (8, 16), (32, 64)])
def test_gate_up_slices(on_rank: OnRank, size: int, rank: int, kept: int, group: int) -> None:
    on_rank(rank, size)
    local = permutation(HIDDEN)
    modules = [
        sparse_module(32, HIDDEN, kept=kept, group=group, local=local, seed=s) for s in (1, 2)
    ]
    layer = MergedColumnParallelLinear(
        HIDDEN,
        [32, 32],
        bias=False,
        quant_config=config([f"{MLP}.gate", f"{MLP}.up"], pattern=f"{kept}:{group}"),
        prefix=f"{MLP}.gate_up_proj",
    )
    for shard in (1, 0):
        load(layer, modules[shard], shard)
    for kind in ("weight_packed", "weight_mask"):
        parts = [rows_of(module.tensors[kind], rank, size) for module in modules]
        assert_equal(getattr(layer, kind), torch.cat(parts))
    expected = torch.cat([rows_of(module.dense, rank, size) for module in modules])
    assert_equal(packed_dense(layer), expected)


def test_fused_on_disk(on_rank: OnRank) -> None:
    """Some models store gate and up as one tensor, which then comes without a shard id."""
    on_rank(1, 2)
    module = sparse_module(32, HIDDEN, local=permutation(HIDDEN))
    name = f"{MLP}.merged"
    layer = MergedColumnParallelLinear(
        HIDDEN, [16, 16], bias=False, quant_config=config([name]), prefix=name
    )
    load(layer, module)
    gate, up = module.dense.split(16)
    assert_equal(packed_dense(layer), torch.cat([gate[8:], up[8:]]))


@pytest.mark.parametrize(("size", "rank"), [(1, 0), (2, 0), (2, 1), (4, 0), (4, 3)])
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (8, 16), (32, 64)])
def test_row_parallel_slices(on_rank: OnRank, size: int, rank: int, kept: int, group: int) -> None:
    """Values, masks and the run-time permutation are all cut along the input."""
    on_rank(rank, size)
    channels = 4 * BLOCK
    module = sparse_module(24, channels, kept=kept, group=group, local=permutation(channels))
    layer = RowParallelLinear(
        channels,
        24,
        bias=False,
        quant_config=config([f"{ATTENTION}.o_proj"], pattern=f"{kept}:{group}"),
        prefix=f"{ATTENTION}.o_proj",
    )
    load(layer, module)
    for kind in ("weight_packed", "weight_mask"):
        assert_equal(getattr(layer, kind), module.tensors[kind].chunk(size, dim=1)[rank])
    assert_equal(layer.input_permutation[0], permutation(channels).chunk(size)[rank])
    assert_equal(packed_dense(layer), module.dense.chunk(size, dim=1)[rank])


@pytest.mark.parametrize("layer_class", [ColumnParallelLinear, ReplicatedLinear])
def test_plain_layers(on_rank: OnRank, layer_class: type) -> None:
    """Replicated layers always take vLLM's first weight loader, and are never cut."""
    on_rank(1, 2)
    module = sparse_module(16, HIDDEN, local=permutation(HIDDEN))
    layer = layer_class(
        HIDDEN, 16, bias=False, quant_config=config(["model.fc1"]), prefix="model.fc1"
    )
    load(layer, module)
    whole = layer_class is ReplicatedLinear
    assert_equal(packed_dense(layer), module.dense if whole else rows_of(module.dense, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_llama_down_on_eight_ranks(on_rank: OnRank, dtype: torch.dtype) -> None:
    """Llama-2-7B's `down` leaves 1376 channels to each of 8 ranks: 21.5 blocks of 64.

    In bfloat16 the kernel pads them; products with unit inputs are exact.
    """
    channels, name = 11008, f"{MLP}.down_proj"
    module = sparse_module(
        2, channels, local=permutation(channels), kind="folded_permutation", dtype=dtype
    )
    value_dtype = str(dtype).removeprefix("torch.")
    for rank in (0, 1, 7):
        on_rank(rank, 8)
        layer = RowParallelLinear(
            channels,
            2,
            bias=False,
            params_dtype=dtype,
            quant_config=config(folded=[name], value_dtype=value_dtype),
            prefix=name,
        )
        load(layer, module)
        assert_equal(packed_dense(layer), module.dense.chunk(8, dim=1)[rank])
        assert not hasattr(layer, "folded_permutation")
        assert layer.weight_packed.is_floating_point() == (dtype == torch.float32)


def test_int8_values_are_scaled(on_rank: OnRank) -> None:
    on_rank(1, 2)
    module = sparse_module(16, HIDDEN, local=permutation(HIDDEN))
    whole = (10 * module.tensors["weight_packed"]).round().to(torch.int8)
    scale = torch.linspace(0.5, 2.0, 16)
    layer = ColumnParallelLinear(
        HIDDEN,
        16,
        bias=False,
        quant_config=config(["model.fc1"], value_dtype="int8"),
        prefix="model.fc1",
    )
    load(
        layer,
        SparseModule({**module.tensors, "weight_packed": whole, "weight_scale": scale}, whole),
    )
    expected = (10 * module.dense).round() * scale.unsqueeze(1)
    assert_equal(packed_dense(layer), rows_of(expected, 1, 2))


@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_groups_of_int4_values_are_cut(on_rank: OnRank, rank: int) -> None:
    """Eight shares of 24 channels, as Llama-2-7B's `down` has shares of 21.5 groups."""
    on_rank(rank, 8)
    name, channels = f"{MLP}.down_proj", 192
    layer = RowParallelLinear(
        *(channels, 8),
        bias=False,
        quant_config=config(folded=[name], value_dtype="int4"),
        prefix=name,
    )
    module = int4_module(8, channels, local=permutation(channels), kind="folded_permutation")
    load(layer, module)
    assert_equal(packed_dense(layer), module.dense.chunk(8, dim=1)[rank])


@pytest.mark.parametrize("rank", [0, 1])
def test_int4_values_are_cut_with_their_multipliers(on_rank: OnRank, rank: int) -> None:
    on_rank(rank, 2)
    values = {"value_dtype": "int4"}
    names = [f"{MLP}.gate", f"{MLP}.up"]
    columns = MergedColumnParallelLinear(
        HIDDEN,
        [32, 32],
        bias=False,
        quant_config=config(names, **values),
        prefix=f"{MLP}.gate_up_proj",
    )
    modules = [int4_module(32, HIDDEN, local=permutation(HIDDEN), seed=seed) for seed in (1, 2)]
    for shard in (1, 0):
        load(columns, modules[shard], shard)
    expected = torch.cat([rows_of(module.dense, rank, 2) for module in modules])
    assert_equal(packed_dense(columns), expected)

    name, channels = f"{ATTENTION}.o_proj", 2 * BLOCK
    rows = RowParallelLinear(
        channels, 24, bias=False, quant_config=config([name], **values), prefix=name
    )
    module = int4_module(24, channels, local=permutation(channels))
    load(rows, module)
    assert_equal(packed_dense(rows), module.dense.chunk(2, dim=1)[rank])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_apply_multiplies(on_rank: OnRank, dtype: torch.dtype) -> None:
    module = sparse_module(32, HIDDEN, local=permutation(HIDDEN))
    layer = ColumnParallelLinear(
        HIDDEN,
        32,
        bias=True,
        params_dtype=dtype,
        quant_config=config(["model.fc1"], value_dtype="bfloat16"),
        prefix="model.fc1",
    )
    values = module.tensors["weight_packed"].bfloat16()
    load(layer, SparseModule({**module.tensors, "weight_packed": values}, module.dense))
    layer.bias.weight_loader(layer.bias, torch.linspace(-1, 1, 32))
    layer.quant_method.process_weights_after_loading(layer)
    # Many float16 are rounded to bfloat16.
    rounded = torch.bfloat16 if dtype == torch.float16 else dtype
    for shape, precision in (((1, 2), dtype), ((3, 5), rounded)):
        x = torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)
        output, _ = layer(x)
        expected = torch.nn.functional.linear(
            x.double(), module.dense.bfloat16().double(), layer.bias.double()
        )
        assert output.dtype == dtype
        tolerance = 4 * torch.finfo(precision).eps
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=8 * tolerance)


def test_the_loaded_tensors_are_dropped(on_rank: OnRank) -> None:
    module = sparse_module(8, HIDDEN, local=permutation(HIDDEN))
    layer = ReplicatedLinear(
        HIDDEN, 8, bias=False, quant_config=config(["model.fc1"]), prefix="model.fc1"
    )
    load(layer, module)
    layer.quant_method.process_weights_after_loading(layer)
    layer.quant_method.process_weights_after_loading(layer)  # vLLM may ask again: nothing to do
    assert [name for name, _ in layer.named_parameters()] == ["weight_packed"]
    assert type(layer.weight_packed) is torch.nn.Parameter
    assert not layer.weight_packed.requires_grad


@pytest.mark.parametrize(
    ("load_format", "reason"),
    [
        ("dummy", "masks and permutations"),
        ("sharded_state", "packed anew"),
        ("runai_streamer_sharded", "packed anew"),
    ],
)
def test_formats_without_a_checkpoint_are_refused(
    on_rank: OnRank, monkeypatch: pytest.MonkeyPatch, load_format: str, reason: str
) -> None:
    current = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    monkeypatch.setattr(weight_files, "get_current_vllm_config_or_none", lambda: current)
    with pytest.raises(CheckpointError, match=rf"--load-format {load_format} .*{reason}"):
        RowParallelLinear(128, 16, bias=False, quant_config=config(), prefix="model.o_proj")


def test_a_pattern_that_the_device_cannot_serve_is_refused_before_loading(
    on_rank: OnRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_gpu(device: torch.device, pattern: Pattern) -> None:
        require_pattern(torch.device("cuda"), pattern)

    monkeypatch.setattr(linear, "require_pattern", on_gpu)
    for pattern in ("4:8", "8:16", "32:64"):
        loose = config(pattern=pattern)
        with pytest.raises(RuntimeError, match=rf"pattern {pattern} has no CUDA.*--target gpu"):
            RowParallelLinear(128, 16, bias=False, quant_config=loose, prefix="model.o_proj")
    RowParallelLinear(128, 16, bias=False, quant_config=config(), prefix="model.o_proj")
