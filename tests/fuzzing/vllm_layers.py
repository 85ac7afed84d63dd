"""Target that loads damaged tensors into layers of vLLM, on one rank or two, and multiplies."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.quantization.config import PermLLMConfig
from tests.fuzzing import plain, samples
from tests.fuzzing.checkpoints import as_tensor, changed_content, reshaped, right_weight
from tests.fuzzing.choices import Choices
from tests.fuzzing.outcome import Finding, Refused
from tests.fuzzing.plain import Stored

BLOCK = 32
DTYPES = (torch.float32, torch.bfloat16)
FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
REMEDY = re.compile(r"remedy: |again|Remove ")
Shard = str | int | None
Arrival = tuple[Shard, str, Stored]  # what vLLM calls the part, the kind of tensor, the tensor


class Part(NamedTuple):
    """Rows of a layer, and the module of the checkpoint that has them.

    `shard` is what vLLM calls them; `pieces` is over how many ranks they are cut at most.
    """

    shard: Shard
    module: str
    rows: int
    pieces: int = 1


@dataclass(frozen=True)
class Served:
    """A layer of vLLM, and what a checkpoint holds for it; `kind` is that of its permutation."""

    build: Callable[..., Any]
    prefix: str
    parts: tuple[Part, ...]
    kind: str = ""
    pattern: str = "2:4"
    value_dtype: str = "float32"
    columns: int = 32
    columns_are_cut: bool = False
    bias: bool = False

    @cached_property
    def rows(self) -> dict[str, int]:
        """Rows of every module."""
        modules = dict.fromkeys(part.module for part in self.parts)
        return {name: sum(p.rows for p in self.parts if p.module == name) for name in modules}

    @cached_property
    def entries(self) -> dict[str, Any]:
        """The quantization_config."""
        listed = [list(self.rows) if self.kind == f"{how}_permutation" else []
                  for how in ("input", "folded")]  # fmt: skip
        return samples.entries(self.pattern, self.value_dtype, BLOCK, *listed)

    @cached_property
    def arrivals(self) -> list[Arrival]:
        """The tensors as the model loader hands them over."""
        shuffle = random.Random(self.prefix)
        permutation = samples.permutation(self.columns, BLOCK, self.pattern, shuffle)
        found: list[Arrival] = []
        for module, shard in {part.module: part.shard for part in self.parts}.items():
            rows = self.rows[module]
            tensors = samples.weights(
                module, rows, self.columns, self.pattern, self.value_dtype, shuffle
            )
            found += [(shard, name.rpartition(".")[2], one) for name, one in tensors.items()]
            if self.kind:
                found.append((shard, self.kind, permutation))
            if self.bias:
                found.append((shard, "bias", samples.values([rows], "F32", shuffle)))
        return found

    @cached_property
    def config(self) -> PermLLMConfig:
        config = PermLLMConfig.from_config(self.entries)
        config.packed_modules_mapping = FUSED
        return config

    def share(self, whole: Tensor, rank: int, ranks: int) -> Tensor:
        """What a rank has of the weight [out, in] or of the bias [out]."""
        if self.columns_are_cut:
            return whole.chunk(ranks, dim=1)[rank] if whole.dim() == 2 else whole
        shares = []
        for part, rows in zip(
            self.parts, whole.split([part.rows for part in self.parts]), strict=True
        ):
            pieces = min(part.pieces, ranks)
            shares.append(rows.chunk(pieces)[rank * pieces // ranks])
        return torch.cat(shares)


def parts(rows: dict[str, int], shards: str, pieces: tuple[int, ...]) -> tuple[Part, ...]:
    """One module for each part of a fused layer."""
    names = [int(shard) if shard.isdigit() else shard for shard in shards]
    return tuple(
        Part(shard, module, count, most)
        for shard, (module, count), most in zip(names, rows.items(), pieces, strict=True)
    )


ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
FC1, DOWN = f"{MLP}.fc1", f"{MLP}.down_proj"
QKV = [f"{ATTENTION}.{part}_proj" for part in "qkv"]
GATE_UP = [f"{MLP}.{part}_proj" for part in ("gate", "up")]
LAYERS = (
    Served(
        lambda **given: linear.ReplicatedLinear(32, 5, **given),
        FC1, (Part(None, FC1, 5),), "input_permutation", bias=True,
    ),
    Served(
        lambda **given: linear.QKVParallelLinear(32, 2, 2, 1, **given), f"{ATTENTION}.qkv_proj",
        parts(dict(zip(QKV, (4, 2, 2), strict=True)), "qkv", (2, 1, 1)), "input_permutation",
        value_dtype="bfloat16", bias=True,
    ),
    Served(
        lambda **given: linear.QKVParallelLinear(64, 2, 4, 2, **given), f"{ATTENTION}.qkv_proj",
        parts(dict(zip(QKV, (8, 4, 4), strict=True)), "qkv", (2, 2, 2)), "input_permutation",
        columns=64, value_dtype="int8",
    ),
    Served(
        lambda **given: linear.QKVParallelLinear(32, 2, 2, 2, **given), f"{ATTENTION}.W_pack",
        tuple(Part(None, f"{ATTENTION}.W_pack", 4, 2) for _ in "qkv"), "input_permutation",
        bias=True,
    ),
    Served(
        lambda **given: linear.MergedColumnParallelLinear(32, [4, 6], **given),
        f"{MLP}.gate_up_proj", parts(dict(zip(GATE_UP, (4, 6), strict=True)), "01", (2, 2)),
        "input_permutation", pattern="4:8", value_dtype="float16",
    ),
    Served(
        lambda **given: linear.RowParallelLinear(64, 3, **given), DOWN, (Part(None, DOWN, 3),),
        "folded_permutation", value_dtype="bfloat16", columns=64, columns_are_cut=True, bias=True,
    ),
    Served(
        lambda **given: linear.RowParallelLinear(64, 3, **given), DOWN, (Part(None, DOWN, 3),),
        "input_permutation", columns=64, columns_are_cut=True,
    ),
    Served(
        lambda **given: linear.RowParallelLinear(48, 3, **given), DOWN, (Part(None, DOWN, 3),),
        value_dtype="int8", columns=48, columns_are_cut=True,
    ),
    Served(
        lambda **given: linear.RowParallelLinear(128, 3, **given), DOWN, (Part(None, DOWN, 3),),
        "input_permutation", value_dtype="int4", columns=128, columns_are_cut=True,
    ),
)  # fmt: skip


def layers(data: bytes) -> None:
    """Every rank refuses nothing and has its share of the weight, or one names what is damaged."""
    choices = Choices(data)
    layer = choices.pick(LAYERS)
    ranks, dtype = choices.pick((1, 2)), choices.pick(DTYPES)
    arrivals = damaged(choices, layer)
    rows, biases, broken = meaning(layer, arrivals, dtype)
    try:
        loaded = [load(layer, arrivals, dtype, rank, ranks, broken) for rank in range(ranks)]
    except Refused:
        if not broken:
            raise Finding("a valid layer was refused") from None
        return
    if broken:
        raise Finding(f"broken tensors of {', '.join(sorted(broken))} are served")
    dense, bias = torch.tensor(rows), torch.tensor(biases)
    for rank, one in enumerate(loaded):
        if layer.bias and not torch.equal(one.bias.float(), layer.share(bias, rank, ranks)):
            raise Finding(f"{layer.prefix} is served with another bias")
        share = layer.share(dense, rank, ranks)
        with torch.inference_mode():
            y = one.quant_method.apply(one, torch.eye(share.shape[1], dtype=dtype))
        held = dtype if one.weight_metadata is None else torch.bfloat16
        if not right_weight(y.t(), share, held, one.weight_scale):
            raise Finding(f"{layer.prefix} is served as another weight")


def damaged(choices: Choices, layer: Served) -> list[Arrival]:
    """The tensors of a layer, with up to three changed, lost, doubled, exchanged or late."""
    arrivals = list(layer.arrivals)
    for _ in range(choices.below(4)):
        at, how = choices.below(len(arrivals)), choices.below(8)
        shard, kind, one = arrivals[at]
        if how < 3:
            content = changed_content(choices, kind, bytearray(one.content), how)
            arrivals[at] = shard, kind, Stored(one.dtype, one.shape, content)
        elif how == 3:
            arrivals[at] = shard, kind, reshaped(choices, one)
        elif how == 4:
            arrivals[at] = shard, kind, choices.pick(arrivals)[2]
        elif how == 5:
            arrivals.append(arrivals.pop(at))
        elif how == 6:
            (shard, _, _) = choices.pick(arrivals)
            arrivals.append((shard, choices.pick((*plain.SPARSE, "weight")), one))
        elif len(arrivals) > 1:
            del arrivals[at]
    return arrivals


def meaning(
    layer: Served, arrivals: list[Arrival], dtype: torch.dtype
) -> tuple[list[list[float]], list[float], Set[str]]:
    """Rows and biases that the tensors mean, and the modules that break a rule."""
    modules = {part.shard: part.module for part in layer.parts}
    tensors: dict[str, dict[str, Stored]] = {module: {} for module in layer.rows}
    broken = set()
    for shard, kind, one in arrivals:
        if kind in tensors[modules[shard]]:
            broken.add(modules[shard])
        tensors[modules[shard]][kind] = one
    dense: list[list[float]] = []
    biases: list[float] = []
    for module, found in tensors.items():
        try:
            plain.require(("bias" in found) == layer.bias)
            rows = plain.read_layer(layer.entries, module, found, canonical=False)
            plain.require((len(rows), len(rows[0])) == (layer.rows[module], layer.columns))
            bias = torch.tensor(found["bias"].numbers() if layer.bias else []).to(dtype)
            plain.require(bias.isfinite().all())  # in the model's dtype too
        except plain.Broken:
            broken.add(module)
            continue
        dense += rows
        biases += bias.tolist()
    orders = {found[layer.kind].content for found in tensors.values() if layer.kind in found}
    if len(orders) > 1:
        broken |= tensors.keys()
    return dense, biases, broken


def load(
    layer: Served, arrivals: list[Arrival], dtype: torch.dtype, rank: int, ranks: int,
    broken: Set[str],
) -> Any:  # fmt: skip
    """Build and fill the layer of a rank; raises `Refused` for an error that names the culprit."""
    with on_rank(rank, ranks):
        built = layer.build(
            quant_config=layer.config, prefix=layer.prefix, params_dtype=dtype, bias=layer.bias
        )
        try:
            for shard, kind, one in arrivals:
                place = getattr(built, kind)
                place.weight_loader(place, as_tensor(one), *([] if shard is None else [shard]))
            built.quant_method.process_weights_after_loading(built)
        except CheckpointError as error:
            message = str(error)
            named = any(f"{module}." in message for module in broken or layer.rows)
            if not named or REMEDY.search(message) is None:
                raise Finding(f"an unclear error: {message[:300]}") from error
            raise Refused from error
    return built


@contextmanager
def on_rank(rank: int, ranks: int) -> Iterator[None]:
    """Layers believe that they are built on a rank of a tensor-parallel group."""
    with ExitStack() as stack:
        for module in (linear, parameter):
            answers = {
                "get_tensor_model_parallel_rank": lambda: rank,
                "get_tensor_model_parallel_world_size": lambda: ranks,
            }
            stack.enter_context(mock.patch.multiple(module, **answers))
        stack.enter_context(set_current_vllm_config(engine()))
        yield


@cache
def engine() -> VllmConfig:
    """The configuration that layers ask for."""
    return VllmConfig()
