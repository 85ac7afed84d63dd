"""What is wrong with a checkpoint is said with the tensor's own name, and never served."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from permllm_vllm.checkpoint.errors import CheckpointError
from tests.quantization.sparse_modules import (
    SparseModule,
    config,
    int4_module,
    load,
    packed_dense,
    permutation,
    sparse_module,
)

CHANNELS = 128
ATTENTION = "model.layers.3.self_attn"
FC1 = "model.layers.3.fc1"
OnRank = Callable[[int, int], None]


@pytest.fixture
def qkv(on_rank: OnRank) -> LinearBase:
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    return QKVParallelLinear(
        CHANNELS, 16, 2, 1, False, quant_config=config(names), prefix=f"{ATTENTION}.qkv_proj"
    )


@pytest.fixture
def fc1(on_rank: OnRank) -> LinearBase:
    return ReplicatedLinear(CHANNELS, 16, bias=False, quant_config=config([FC1]), prefix=FC1)


def modules(seeds: str = "aaa") -> dict[str, SparseModule]:
    """q, k and v; equal letters share a permutation."""
    return {
        shard: sparse_module(rows, CHANNELS, local=permutation(CHANNELS, seed=ord(letter)))
        for shard, rows, letter in zip("qkv", (32, 16, 16), seeds, strict=True)
    }


def without(module: SparseModule, kind: str) -> SparseModule:
    kept = {name: tensor for name, tensor in module.tensors.items() if name != kind}
    return SparseModule(kept, module.dense)


def changed(module: SparseModule, kind: str, change: Callable[[Tensor], Tensor]) -> SparseModule:
    tensor = change(module.tensors[kind].clone())
    return SparseModule({**module.tensors, kind: tensor}, module.dense)


def first_is(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize("kind", ["weight_packed", "weight_mask", "input_permutation"])
def test_a_missing_tensor(qkv: LinearBase, kind: str) -> None:
    """Not even when the other parts of the fused layer are there."""
    for shard, module in modules().items():
        load(qkv, without(module, kind) if shard == "k" else module, shard)
    with pytest.raises(CheckpointError, match=rf"no {ATTENTION}\.k_proj\.{kind}, but"):
        packed_dense(qkv)


def test_a_classifier_that_vllm_adds(on_rank: OnRank) -> None:
    """As `vllm serve --convert classify` does where the model has none."""
    layer = ReplicatedLinear(CHANNELS, 2, bias=False, quant_config=config(), prefix="score")
    with pytest.raises(
        CheckpointError, match=r"no score\.weight_packed.*--convert classify.*leave"
    ):
        packed_dense(layer)


def test_all_missing_tensors_are_named(qkv: LinearBase) -> None:
    load(qkv, modules()["q"], "q")
    with pytest.raises(
        CheckpointError,
        match=rf"{ATTENTION}\.k_proj\.weight_packed, {ATTENTION}\.v_proj\.weight_packed",
    ):
        packed_dense(qkv)


def test_a_missing_folded_permutation(on_rank: OnRank) -> None:
    name = "model.layers.3.mlp.down_proj"
    layer = RowParallelLinear(
        CHANNELS, 16, bias=False, quant_config=config(folded=[name]), prefix=name
    )
    load(layer, sparse_module(16, CHANNELS))
    with pytest.raises(CheckpointError, match=r"no .*down_proj\.folded_permutation"):
        packed_dense(layer)


@pytest.fixture
def biased(on_rank: OnRank) -> LinearBase:
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    layer = QKVParallelLinear(
        CHANNELS, 16, 2, 1, True, quant_config=config(names), prefix=f"{ATTENTION}.qkv_proj"
    )
    for shard, module in modules().items():
        load(layer, module, shard)
    return layer


def test_a_missing_bias(biased: LinearBase) -> None:
    """The format asks for none, but the model does, and would take what is in memory."""
    for shard in "qv":
        biased.bias.weight_loader(biased.bias, torch.ones(32 if shard == "q" else 16), shard)
    with pytest.raises(CheckpointError, match=rf"no {ATTENTION}\.k_proj\.bias, but"):
        packed_dense(biased)
    biased.bias.weight_loader(biased.bias, torch.ones(16), "k")
    packed_dense(biased)
    assert biased.bias.tolist() == [1.0] * 64


@pytest.mark.parametrize("bias", [torch.ones(17), torch.ones(16, 1), torch.ones(16).int()])
def test_a_wrong_bias(biased: LinearBase, bias: Tensor) -> None:
    with pytest.raises(CheckpointError, match=r"v_proj\.bias is .*any floating dtype \[16\]"):
        biased.bias.weight_loader(biased.bias, bias, "v")


def test_a_missing_bias_of_a_row_parallel_layer(on_rank: OnRank) -> None:
    on_rank(1, 2)
    layer = RowParallelLinear(CHANNELS, 16, quant_config=config(), prefix=FC1)
    load(layer, sparse_module(16, CHANNELS))
    with pytest.raises(CheckpointError, match=r"no model\.layers\.3\.fc1\.bias, but"):
        packed_dense(layer)


@pytest.mark.parametrize("kind", ["weight_packed", "weight_mask", "input_permutation"])
def test_a_doubled_tensor(qkv: LinearBase, kind: str) -> None:
    for shard, module in modules().items():
        load(qkv, module, shard)
    again = SparseModule({kind: modules()["v"].tensors[kind]}, torch.empty(0))
    with pytest.raises(CheckpointError, match=rf"{ATTENTION}\.v_proj\.{kind} was loaded twice"):
        load(qkv, again, "v")


def test_permutations_that_disagree(qkv: LinearBase) -> None:
    for shard, module in modules("aba").items():
        load(qkv, module, shard)
    with pytest.raises(
        CheckpointError,
        match=r"k_proj\.input_permutation differs from .*q_proj\.input_permutation \(first at",
    ):
        packed_dense(qkv)


def test_gate_and_up_disagree(on_rank: OnRank) -> None:
    names = ["model.gate", "model.up"]
    layer = MergedColumnParallelLinear(
        CHANNELS,
        [16, 16],
        bias=False,
        quant_config=config(names),
        prefix="model.gate_up_proj",
    )
    for shard in (0, 1):
        local = permutation(CHANNELS, seed=shard)
        load(layer, sparse_module(16, CHANNELS, local=local), shard)
    with pytest.raises(CheckpointError, match=r"model\.up\.input_permutation differs from"):
        packed_dense(layer)


@pytest.mark.parametrize("value", [64, 255])
def test_a_permutation_out_of_range(fc1: LinearBase, value: int) -> None:
    module = sparse_module(16, CHANNELS, local=permutation(CHANNELS))
    load(fc1, changed(module, "input_permutation", first_is(value)))
    with pytest.raises(CheckpointError, match=r"fc1\.input_permutation is no permutation"):
        packed_dense(fc1)


def test_a_permutation_with_a_channel_twice(fc1: LinearBase) -> None:
    local = permutation(CHANNELS)
    local[1] = local[0]
    load(fc1, sparse_module(16, CHANNELS, local=local % 64))
    with pytest.raises(CheckpointError, match=r"every block of 64 must hold each of 0\.\.63 once"):
        packed_dense(fc1)


def test_a_folded_permutation_that_is_none(on_rank: OnRank) -> None:
    """It is not applied, but a damaged one tells that the file is damaged."""
    name = "model.layers.3.mlp.down_proj"
    on_rank(1, 2)
    layer = RowParallelLinear(
        CHANNELS, 16, bias=False, quant_config=config(folded=[name]), prefix=name
    )
    local = permutation(CHANNELS)
    local[0] = local[1]  # in the other rank's slice
    with pytest.raises(CheckpointError, match=r"down_proj\.folded_permutation is no permutation"):
        load(layer, sparse_module(16, CHANNELS, local=local, kind="folded_permutation"))


@pytest.mark.parametrize(("byte", "kept"), [(0b0011_0111, 3), (0b0011_0001, 1)])
def test_a_mask_with_a_wrong_bit_count(qkv: LinearBase, byte: int, kept: int) -> None:
    for shard, module in modules().items():
        damaged = changed(module, "weight_mask", first_is(byte))
        load(qkv, damaged if shard == "v" else module, shard)
    with pytest.raises(
        CheckpointError, match=rf"v_proj\.weight_mask keeps {kept} weights in group 0 of row 0"
    ):
        packed_dense(qkv)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers(qkv: LinearBase, value: float) -> None:
    for shard, module in modules().items():
        damaged = changed(module, "weight_packed", first_is(value))
        load(qkv, damaged if shard == "k" else module, shard)
    with pytest.raises(
        CheckpointError,
        match=rf"^{ATTENTION}\.k_proj\.weight_packed: found inf or nan; rule: .*; remedy: ",
    ):
        packed_dense(qkv)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_last_value_that_is_no_number(on_rank: OnRank, dtype: torch.dtype, value: float) -> None:
    """Of any dtype, wherever it is, in a slice of odd size."""
    on_rank(1, 2)
    quantization = config(value_dtype=str(dtype).removeprefix("torch."))
    layer = RowParallelLinear(144, 3, bias=False, quant_config=quantization, prefix=FC1)
    module = sparse_module(3, 144)
    values = module.tensors["weight_packed"].to(dtype)
    values[-1, -1] = value
    load(layer, SparseModule({**module.tensors, "weight_packed": values}, module.dense))
    with pytest.raises(CheckpointError, match=r"fc1\.weight_packed: found inf or nan"):
        packed_dense(layer)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_no_number(biased: LinearBase, dtype: torch.dtype, value: float) -> None:
    for shard, rows in {"q": 32, "k": 16, "v": 16}.items():
        bias = torch.ones(rows, dtype=dtype)
        bias[-1] = value if shard == "v" else 1
        biased.bias.weight_loader(biased.bias, bias, shard)
    with pytest.raises(CheckpointError, match=rf"^{ATTENTION}\.v_proj\.bias: found inf or nan"):
        packed_dense(biased)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_is_none(on_rank: OnRank, scale: float) -> None:
    layer = MergedColumnParallelLinear(
        CHANNELS,
        [16, 16],
        bias=False,
        quant_config=config(value_dtype="int8"),
        prefix="model.gate_up_proj",
    )
    for shard in (0, 1):
        module = sparse_module(16, CHANNELS)
        values = module.tensors["weight_packed"].to(torch.int8)
        scales = torch.ones(16)
        scales[5] = scale if shard else 1
        tensors = {**module.tensors, "weight_packed": values, "weight_scale": scales}
        load(layer, SparseModule(tensors, module.dense), shard)
    with pytest.raises(
        CheckpointError,
        match=rf"^model\.up\.weight_scale: found {scale}; rule: finite and above 0; remedy: ",
    ):
        packed_dense(layer)


@pytest.mark.parametrize("multiplier", [0, 17])
def test_a_multiplier_that_is_none(on_rank: OnRank, multiplier: int) -> None:
    name = "model.fc1"
    layer = ReplicatedLinear(
        CHANNELS, 16, bias=False, quant_config=config([name], value_dtype="int4"), prefix=name
    )
    module = int4_module(16, CHANNELS, local=permutation(CHANNELS))
    module.tensors["weight_multiplier"][3, 0] = multiplier
    load(layer, module)
    with pytest.raises(
        CheckpointError, match=rf"^{name}\.weight_multiplier: found {multiplier}; rule: 1 to 16"
    ):
        packed_dense(layer)


def test_a_tensor_for_all_parts_is_named_once(on_rank: OnRank) -> None:
    layer = MergedColumnParallelLinear(
        CHANNELS, [16, 16], bias=False, quant_config=config(), prefix="model.fused"
    )
    module = sparse_module(32, CHANNELS)
    module.tensors["weight_packed"][[0, 31]] = math.nan
    load(layer, module)
    with pytest.raises(CheckpointError, match=r"^model\.fused\.weight_packed: found inf or nan"):
        packed_dense(layer)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("weight_packed", lambda t: t[:, :-1], r"float32 \[16, 63\].*float32 \[16, 64\]"),
        ("weight_packed", lambda t: torch.cat([t, t]), r"\[32, 64\].*\[16, 64\]"),
        ("weight_packed", lambda t: t.bfloat16(), r"bfloat16 .*float32"),
        ("weight_mask", lambda t: t.to(torch.int32), r"int32 .*uint8"),
        ("weight_mask", lambda t: t.repeat(1, 2), r"\[16, 32\].*\[16, 16\]"),
        ("input_permutation", lambda t: t[:64], r"\[64\].*\[128\]"),
        ("input_permutation", lambda t: t.long(), r"int64 .*uint8"),
    ],
)
def test_a_wrong_shape_or_dtype(
    fc1: LinearBase, kind: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    module = sparse_module(16, CHANNELS, local=permutation(CHANNELS))
    with pytest.raises(CheckpointError, match=rf"fc1\.{kind} is torch\..*{message}"):
        load(fc1, changed(module, kind, change))


def test_more_rows_than_the_ranks_need(on_rank: OnRank) -> None:
    """vLLM would take its slice of a tensor that is too long without a word."""
    on_rank(0, 2)
    names = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
    layer = QKVParallelLinear(
        CHANNELS, 16, 2, 1, False, quant_config=config(names), prefix=f"{ATTENTION}.qkv_proj"
    )
    long = sparse_module(48, CHANNELS, local=permutation(CHANNELS))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_packed is .*\[48, 64\].*\[32, 64\]"):
        load(layer, long, "q")


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("weight", torch.zeros(32, CHANNELS)),
        ("folded_permutation", permutation(CHANNELS)),
        ("weight_scale", torch.ones(32)),
    ],
)
def test_a_tensor_that_the_configuration_does_not_have(
    qkv: LinearBase, kind: str, tensor: Tensor
) -> None:
    with pytest.raises(CheckpointError, match=rf"q_proj\.{kind} is in the checkpoint, but"):
        load(qkv, SparseModule({kind: tensor}, tensor), "q")


def test_an_unlisted_input_permutation(on_rank: OnRank) -> None:
    layer = ReplicatedLinear(CHANNELS, 16, bias=False, quant_config=config(), prefix=FC1)
    with pytest.raises(CheckpointError, match=r"fc1\.input_permutation is in .*`runtime_permuted`"):
        load(layer, sparse_module(16, CHANNELS, local=permutation(CHANNELS)))
