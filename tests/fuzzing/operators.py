"""Targets that call the operators: packing a weight, and multiplying with what was packed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, PackedWeights
from permllm_vllm.backends.cpu import INT8_ONLY, SIXTEEN_BITS_ONLY, CpuBackend, instruction_sets
from tests.fuzzing.choices import Choices
from tests.fuzzing.outcome import Finding, Refused, refusing

ERRORS = (RuntimeError, ValueError)
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.int8, torch.uint8, torch.int32,
          torch.int64, torch.bool)  # fmt: skip
NUMBERS = (0, 1, -1, 2, 3, 8, 16, 24, 64, 128, 255, 2**31, 2**40, 2**62, -(2**63))
SHAPES = (
    (1, 8, "2:4", 64, False),
    (3, 64, "2:4", 64, True),
    (9, 96, "4:8", 32, True),
    (17, 128, "2:4", 128, True),
    (8, 72, "4:8", 64, False),
    (33, 192, "2:4", 64, True),
)  # outputs, inputs, pattern, block size, permuted
TOKENS = (2, 1, 3, 5, 9, 17, 33, 65, 100)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of y, half a unit in the last place
SMALLEST = 2**-24  # of float16
SUMS = 1e-6  # of sums in float32, of the sum of all magnitudes
HALF_PRODUCTS = 2**-8  # of float16 that is rounded to bfloat16
STEP = 0.501 / 127  # of activations rounded to int8, of the largest of their token


@dataclass(frozen=True)
class Packed:
    """A layer, as it is and as one instruction set packs it."""

    layer: Layer
    dense: Tensor
    weights: PackedWeights


@cache
def layers() -> list[Layer]:
    return [
        random_layer(n, k, pattern, block, permuted=permuted, bias=True, seed=n)
        for n, k, pattern, block, permuted in SHAPES
    ]


@cache
def packed() -> list[Packed]:
    """Every layer, in bfloat16 and in int8, for every instruction set of this machine."""
    found = []
    for isa in instruction_sets():
        for layer in layers():
            found.append(Packed(layer, layer.dense.float(), CpuBackend(isa).pack(layer.weights)))
            weights = as_int8(layer.weights)
            packed_weights = CpuBackend(isa).pack(weights)
            dense = int8_dense(layer, weights)
            if packed_weights.scale is None:  # held in bfloat16
                dense = dense.bfloat16().float()
            found.append(Packed(layer, dense, packed_weights))
    return found


def as_int8(weights: CheckpointWeights) -> CheckpointWeights:
    largest = weights.values.float().abs().amax(dim=1).clamp_min(1e-3)
    scale = largest / 127
    values = (weights.values.float() / scale[:, None]).round().to(torch.int8)
    return CheckpointWeights(**{**vars(weights), "values": values, "scale": scale})


def int8_dense(layer: Layer, weights: CheckpointWeights) -> Tensor:
    """The weight that the rounded values mean, place by place."""
    assert weights.scale is not None
    return (layer.dense.float() / weights.scale[:, None]).round() * weights.scale[:, None]


def linear(data: bytes) -> None:
    """sparse_linear: damaged header and blob, tensors of any shape, dtype and strides."""
    choices = Choices(data)
    chosen = choices.pick(packed())
    weights, layer, dense = chosen.weights, chosen.layer, chosen.dense
    n, k = dense.shape
    x = torch.randn(choices.pick(TOKENS), k, generator=torch.Generator().manual_seed(1))
    dtype = torch.float16 if choices.once_in(4) else torch.bfloat16
    arguments = {
        "x": x.to(dtype), "packed": weights.packed, "metadata": weights.metadata,
        "permutation": weights.permutation, "scale": weights.scale,
        "bias": None if layer.bias is None else layer.bias.to(dtype), "out_features": n,
        "pattern": str(layer.weights.pattern),
    }  # fmt: skip
    exact = True
    for _ in range(choices.below(3)):
        exact &= damage_argument(choices, arguments)
    try:
        y = refusing(lambda: ops.sparse_linear(**arguments), *ERRORS)  # type: ignore[arg-type]
    except Refused:
        if exact:
            raise Finding("good arguments were refused") from None
        return
    x = arguments["x"]  # type: ignore[assignment]
    if arguments["packed"].dtype == torch.uint8 and y.shape != (*x.shape[:-1], n):  # type: ignore[union-attr]
        raise Finding(f"shape {tuple(y.shape)} for {tuple(x.shape)} inputs and {n} outputs")
    if exact and y.numel():
        bias = arguments["bias"]
        expected = x.double() @ dense.double().t() + (0 if bias is None else bias.double())  # type: ignore[union-attr]
        off = (y.double() - expected).abs() - limits(x, dense, expected, weights.scale)
        if not bool((off <= 0).all()):
            raise Finding(f"wrong numbers: off by {off.max()} more than their roundings")


def limits(x: Tensor, dense: Tensor, expected: Tensor, scale: Tensor | None) -> Tensor:
    """How much each output may be off; less than a dropped weight puts one of a row."""
    magnitudes, weights = x.double().abs(), dense.double().abs()
    sums = SUMS + (HALF_PRODUCTS if x.dtype == torch.float16 else 0)
    found = ROUNDING[x.dtype] * expected.abs() + SMALLEST + sums * (magnitudes @ weights.t())
    if scale is not None:
        found += STEP * magnitudes.amax(-1, keepdim=True) * weights.sum(1)
    return found


def damage_argument(choices: Choices, arguments: dict[str, object]) -> bool:
    """Change one argument; True where the answer must stay right."""
    how = choices.below(10)
    metadata, blob = arguments["metadata"], arguments["packed"]
    if how == 0:
        arguments["x"] = restrided(choices, arguments["x"])  # type: ignore[arg-type]
        return True
    # An earlier change may have left another dtype, which holds no such numbers.
    whole = isinstance(metadata, Tensor) and metadata.dtype == torch.int64
    if how == 1 and isinstance(metadata, Tensor) and whole and metadata.numel():
        metadata = arguments["metadata"] = metadata.clone()
        at = choices.below(metadata.numel())
        value = choices.pick(NUMBERS) + (choices.below(3) if choices.once_in(2) else 0)
        metadata.view(-1)[at] = max(min(value, 2**63 - 1), -(2**63))
        return False
    if how == 2 and isinstance(blob, Tensor) and blob.numel():
        blob = arguments["packed"] = blob.clone()
        for _ in range(choices.below(4)):
            blob.view(torch.uint8).view(-1)[choices.below(blob.nbytes)] = choices.below(256)
        return False
    if how == 3:
        arguments["out_features"] = choices.pick(NUMBERS)
        return False
    if how == 4:
        arguments["bias"] = None if choices.once_in(4) else tensor(choices)
        return False
    if how == 5:
        arguments[choices.pick(("scale", "permutation", "metadata"))] = None
        return False
    name = choices.pick(("x", "packed", "metadata", "permutation", "scale", "bias"))
    given = arguments[name]
    arguments[name] = reshaped(choices, given) if isinstance(given, Tensor) else tensor(choices)
    return False


def restrided(choices: Choices, x: Tensor) -> Tensor:
    """The same numbers with other strides, dimensions or alignment."""
    how = choices.below(6)
    if how == 0:
        return x.t().contiguous().t() if x.dim() == 2 else x
    if how == 1:
        return torch.cat([x, x], -1)[..., : x.shape[-1]]
    if how == 2:
        return x.repeat_interleave(2, -1)[..., ::2]
    if how == 3:
        return x.unsqueeze(choices.below(x.dim()))
    if how == 4:
        return x[:1].expand(choices.below(5), *x.shape[1:])
    storage = torch.empty(x.numel() + 1, dtype=x.dtype)
    return storage[1:].view(x.shape).copy_(x)


def reshaped(choices: Choices, given: Tensor) -> Tensor:
    """Another dtype, shape, length or content."""
    how = choices.below(6)
    flat = given.reshape(-1)
    if how == 0:
        return given.to(choices.pick(DTYPES))
    if how == 1:
        return flat[: choices.below(flat.numel() + 1)].clone()
    if how == 2:
        return given.unsqueeze(0)
    if how == 3:
        return torch.cat([flat, flat])
    if how == 4:
        return flat.repeat_interleave(2)[::2]
    changed = flat.clone()
    if changed.numel():
        changed[choices.below(changed.numel())] = choices.below(256) - 128 if changed.dtype in (
            torch.int8, torch.int32, torch.int64) else choices.below(128)  # fmt: skip
    return changed.view(given.shape)


def tensor(choices: Choices) -> Tensor:
    """A small tensor of any dtype."""
    shape = [choices.below(40) for _ in range(choices.below(4))]
    return torch.zeros(shape).to(choices.pick(DTYPES))


def pack(data: bytes) -> None:
    """cpu_pack: weights of any shape, dtype and strides, damaged masks and permutations."""
    choices = Choices(data)
    layer = choices.pick(layers())
    int8 = choices.once_in(3)
    weights = as_int8(layer.weights) if int8 else layer.weights
    without = () if int8 else INT8_ONLY
    isa = choices.pick([isa for isa in instruction_sets() if isa not in without])
    block = weights.block_size
    undone = block <= 64 and isa in SIXTEEN_BITS_ONLY
    arguments = [weights.values, weights.mask, weights.permutation if undone else None, block, isa]
    exact = True
    for _ in range(choices.below(3)):
        exact &= damage_pack_argument(choices, arguments)
    try:
        blob, metadata = refusing(lambda: torch.ops.permllm.cpu_pack(*arguments), *ERRORS)
    except Refused:
        if exact:
            raise Finding("a good weight was refused") from None
        return
    values, mask, local = arguments[0], arguments[1], arguments[2]
    assert isinstance(values, Tensor)
    assert isinstance(mask, Tensor)
    if values.dtype != torch.bfloat16:
        return
    expected = dense_by_loops(values, mask, local, int(arguments[3]))  # type: ignore[arg-type, call-overload]
    inputs = torch.eye(expected.shape[1], dtype=torch.bfloat16)
    y = ops.sparse_linear(inputs, blob, metadata, None, None, None, expected.shape[0], "2:4")
    if not torch.equal(y.t().float(), expected):
        raise Finding("another weight was packed")


def dense_by_loops(values: Tensor, mask: Tensor, local: Tensor | None, block: int) -> Tensor:
    """The weight by the format's definition; raises `Finding` for a mask with too many or few."""
    rows, columns = values.shape[0], values.shape[1] * 2
    numbers, bytes_, entries = (
        values.tolist(),
        mask.tolist(),
        None if local is None else local.flatten().tolist(),
    )
    dense = [[0.0] * columns for _ in range(rows)]
    for row in range(rows):
        kept = [j for j in range(columns) if bytes_[row][j // 8] >> (j % 8) & 1]
        if len(kept) != columns // 2:
            raise Finding(f"a mask that keeps {len(kept)} of {columns} was accepted")
        for j, number in zip(kept, numbers[row], strict=True):
            place = j if entries is None else j // block * block + entries[j]
            if entries is not None and entries[j] >= block:
                raise Finding(f"the entry {entries[j]} of a block of {block} was accepted")
            dense[row][place] = number
    return torch.tensor(dense)


def damage_pack_argument(choices: Choices, arguments: list[object]) -> bool:
    """Change one argument; True where the weight must still be packed right."""
    how = choices.below(8)
    at = choices.below(3)
    given = arguments[at]
    if how == 0 and isinstance(given, Tensor) and given.dim() == 2:
        arguments[at] = choices.pick(
            (given.t().contiguous().t(), torch.cat([given, given], 1)[:, : given.shape[1]])
        )
        return True
    if how <= 3 and isinstance(given, Tensor) and given.numel() and given.dtype == torch.uint8:
        changed = arguments[at] = given.clone(memory_format=torch.contiguous_format)
        flat = changed.view(-1)
        flat[choices.below(flat.numel())] = choices.pick((0, 0xFF, 0x33, 0x0F, 31, 32, 63, 64, 128))
        if how == 3:
            flat[choices.below(flat.numel())] ^= 1 << choices.below(8)
        return False
    if how == 4:
        arguments[3] = choices.pick((*NUMBERS, 32))
    elif how == 5:
        isa = choices.pick(("", "mmx", "amx", "portable", "avx2", "\0"))
        arguments[4] = isa
        serving = isa or torch.ops.permllm.cpu_instruction_set()
        if arguments[2] is not None and serving not in SIXTEEN_BITS_ONLY:
            return False
        return isa in ("", "portable") and serving not in INT8_ONLY
    elif isinstance(given, Tensor):
        arguments[at] = reshaped(choices, given)
    else:
        arguments[at] = tensor(choices)
    return False
