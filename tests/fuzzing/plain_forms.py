"""Models in 8 bits once more, in plain Python: which dense tensors `config.json` and a file mean.

Shares no code with `permllm_vllm`. It gives an answer only where every rule is kept.
"""

from __future__ import annotations

import math
import struct
from typing import Any, NamedTuple

from tests.checkpoint.plain_scaled import bfloat16, decode_e4m3, decode_int8, float32
from tests.fuzzing.plain import Broken, Stored, require

DECODERS = {"F8_E4M3": decode_e4m3, "I8": decode_int8}
EIGHT_BITS = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8")
SCALES = {"F32": ("f", 0), "BF16": ("H", 16), "F16": ("e", 0)}
OF_OTHERS = (
    "input_scale",
    "output_scale",
    "activation_scale",
    "k_scale",
    "kv_scale",
    "k_cache.scale",
)
OF_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
FUSED = {"experts.gate_up_proj": ("gate_proj", "up_proj"), "experts.down_proj": ("down_proj",)}


class Form(NamedTuple):
    """Dtype of weights, by its name in files (empty: none is in 8 bits), rows and columns of a
    block (None: all)."""

    dtype: str
    rows: int | None
    columns: int | None


def read_form(config: dict[str, Any]) -> Form | None:
    """How weights are stored, by a parsed config.json."""
    entries = None
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if not entries and isinstance(place, dict) and place.get(key) is not None:
                entries = place[key]  # the first that says anything
                require(isinstance(entries, dict))
    if not entries:
        return None
    inner = entries.get("quantization_config")
    require(inner is None or isinstance(inner, dict))
    if inner:
        entries = {key: entries[key] for key in entries if key != "quantization_config"} | inner
    method = entries.get("quant_method")
    if method == "fp8":
        size = entries.get("weight_block_size")
        return Form("F8_E4M3", *((None, None) if size is None else block(size)))
    own = ("config_groups", "sparsity_config", "format", "kv_cache_scheme")
    require(
        any(key in entries for key in own)
        if method is None
        else method in ("compressed-tensors", "sparseml")
    )
    return of_groups(entries)


def of_groups(entries: dict[str, Any]) -> Form | None:
    """compressed-tensors' entries."""
    groups = entries.get("config_groups")
    for key in ("sparsity_config", "transform_config"):
        require(entries.get(key) is None or isinstance(entries[key], dict))
    if entries.get("sparsity_config"):
        require((entries["sparsity_config"].get("format") or "dense") == "dense")
    else:
        require(groups or entries.get("format") in (None, "dense", "fakequant", *OF_FORMATS))
    require(not (entries.get("transform_config") or {}).get("config_groups"))
    if not groups:
        return Form("", None, None) if entries.get("kv_cache_scheme") else None
    require(isinstance(groups, dict))
    require(all(one is None or isinstance(one, dict) for one in groups.values()))
    forms = [
        of_weights(one["weights"], one.get("format") or entries.get("format"))
        for one in groups.values()
        if one is not None and one.get("weights") is not None
    ]
    require(len(set(forms)) == 1)
    return forms[0]


def of_weights(weights: Any, layout: object) -> Form:
    require(layout in OF_FORMATS and isinstance(weights, dict))
    kind, strategy = weights.get("type") or "int", weights.get("strategy")
    kind = kind.lower() if isinstance(kind, str) else kind
    require(kind in ("float", "int") and weights.get("num_bits", 8) == 8)
    require(weights.get("symmetric", True))
    dtype = "F8_E4M3" if kind == "float" else "I8"
    strategy, size = (
        strategy.lower() if isinstance(strategy, str) else strategy,
        weights.get("group_size"),
    )
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    require(strategy in ("tensor", "channel", "group", "block"))
    if strategy == "tensor":
        return Form(dtype, None, None)
    if strategy == "channel":
        return Form(dtype, 1, None)
    return Form(dtype, *block([1, size] if strategy == "group" else weights.get("block_structure")))


def block(size: Any) -> tuple[int, int]:
    require(isinstance(size, list) and len(size) == 2)
    require(all(type(one) is int and 0 < one < 2**31 for one in size))
    return size[0], size[1]


def read(config: dict[str, Any], stored: dict[str, Stored]) -> dict[str, Stored]:
    """The dense tensors; experts of decoder layers are separate ones."""
    form = read_form(config)
    dense: dict[str, Stored] = {}
    scaled = {
        name: scales for name in stored if is_weight(name) and (scales := beside(name, stored))
    }
    taken = {one for scales in scaled.values() for one in scales} if form is not None else set()
    for name, tensor in stored.items():
        if form is not None and (
            name in taken or name.endswith(tuple(f".{one}" for one in OF_OTHERS))
        ):
            continue
        if form is not None and name in scaled:
            require(len(scaled[name]) == 1)
            dense[name] = product(name, tensor, stored[scaled[name][0]], form)
            continue
        if form is not None:
            require_known(name, scaled)
        require(not tensor.dtype.startswith("F8_"))
        require(not (is_weight(name) and tensor.dtype in EIGHT_BITS))
        dense[name] = tensor
    return {name: one for fused, tensor in dense.items() for name, one in separate(fused, tensor)}


def is_weight(name: str) -> bool:
    return name.endswith((".weight", *FUSED))


def beside(name: str, stored: dict[str, Stored]) -> list[str]:
    return [one for one in (f"{name}_scale_inv", f"{name}_scale") if one in stored]


def require_known(name: str, scaled: dict[str, list[str]]) -> None:
    """Nothing that belongs to a quantization is left: it would be no tensor of the dense model."""
    module, _, kind = name.rpartition(".")
    require(
        not kind.endswith("_scale_inv") and not kind.startswith(("weight_scale", "weight_zero"))
    )
    require(not name.removesuffix("_scale").endswith(tuple(FUSED)) or not kind.endswith("_scale"))
    holders = [weight.rpartition(".")[0] for weight in scaled]
    holders += [holder.rpartition(".")[0] for holder in holders]
    numbered = any(part.isdigit() for part in name.split("."))
    require(not (kind.endswith(("_scale", "_zero_point")) and module in holders and numbered))


def product(name: str, weight: Stored, scale: Stored, form: Form) -> Stored:
    """A weight times its scale, in bfloat16."""
    require(weight.dtype == form.dtype and scale.dtype in SCALES)
    require(len(weight.shape) >= 2 and 0 not in weight.shape)
    *before, rows, columns = weight.shape
    linears = next((len(parts) for end, parts in FUSED.items() if name.endswith(end)), 1)
    require(linears == 1 or rows % (linears * (form.rows or 1)) == 0)
    high, wide = form.rows or rows, form.columns or columns
    down, across = -(-rows // high), -(-columns // wide)
    allowed = [[*before, down, across]]
    if form.columns is None:
        allowed.append([*before, down])
    if form.rows is None:
        allowed += [before]
        halves = [[*before, linears, 1], [*before, linears]] if linears > 1 else []
        if scale.shape in halves:
            high, down = rows // linears, linears
        allowed += halves
    require(scale.shape in allowed)
    code, shift = SCALES[scale.dtype]
    words = struct.unpack(f"<{math.prod(scale.shape)}{code}", scale.content)
    factors = [widened(one, shift) for one in words]
    require(all(map(math.isfinite, factors)))
    content = b""
    for at, byte in enumerate(weight.content):
        matrix, i, j = at // columns // rows, at // columns % rows, at % columns
        content += rounded(
            DECODERS[form.dtype](byte), factors[(matrix * down + i // high) * across + j // wide]
        )
    return Stored("BF16", weight.shape, content)


def widened(word: Any, shift: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", word << shift))[0]) if shift else word


def rounded(value: float, factor: float) -> bytes:
    """The bytes of a product: rounded to float32, and then to bfloat16."""
    require(math.isfinite(value))
    try:
        number = bfloat16(float32(value * factor))
    except (OverflowError, struct.error):
        raise Broken from None
    require(math.isfinite(number))
    return struct.pack("<f", number)[2:]


def separate(name: str, tensor: Stored) -> list[tuple[str, Stored]]:
    """The matrices of experts in one tensor."""
    parts = next((parts for end, parts in FUSED.items() if name.endswith(end)), ())
    shape = tensor.shape
    under = name.startswith("model.layers.") and parts and len(shape) == 3
    if not under or shape[1] % len(parts) or shape[0] == 0:
        return [(name, tensor)]
    module, matrix = name.rpartition(".")[0], [shape[1] // len(parts), shape[2]]
    size = len(tensor.content) // (shape[0] * len(parts))
    return [
        (
            f"{module}.{expert}.{part}.weight",
            Stored(tensor.dtype, matrix, tensor.content[at * size : (at + 1) * size]),
        )
        for expert in range(shape[0])
        for number, part in enumerate(parts)
        for at in [expert * len(parts) + number]
    ]
