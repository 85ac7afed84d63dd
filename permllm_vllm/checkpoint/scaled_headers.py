"""Which scale belongs to which weight of 8 bits, and the headers of the dense model they make."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.fused_experts import is_fused, linears_in
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.packed_integers import unpacked_headers
from permllm_vllm.checkpoint.quantization_entries import FROM_BEFORE
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.stacks import places_in_stacks

_SCALES = ("_scale_inv", "_scale")
"""What the name of a scale adds to that of its weight; both multiply."""
_OF_OTHERS = re.compile(
    r"(.*\.)?("
    r"(\w+_proj_)?(input|output|activation)_(scale|global_scale|zero_point|g_idx)"
    r"|(q|k|v|kv|prob)_(scale|zero_point)|[kv]_cache\.scale)"
)
"""Names of what belongs to activations and caches, which dense models have no use for."""
_OF_WEIGHTS = re.compile(
    r"weight_(scale|zero_point|global_scale|g_idx|packed|shape)\w*|\w+_scale_inv"
)
"""What weights of other forms have beside them."""
_SMALL_FLOATS = ("float8_", "F8_", "F6_", "F4")
"""What the names of dtypes begin with that stand for nothing without a scale."""
_SMALL_WHOLE = ("int8", "uint8")
_SCALE_DTYPES = ("float32", "bfloat16", "float16")
_NOT_READ = f"{FETCH_AGAIN}; where it stays so, its form is not read: {FROM_BEFORE}"
"""The remedy where weights are damaged, or in a form that `config.json` does not tell."""


def dense_headers(
    headers: Mapping[str, TensorHeader], form: ScaledForm | None, dtype: str
) -> dict[str, TensorHeader]:
    """Return the headers of the dense model that stored tensors stand for, scales left out.

    `headers` are those of a whole checkpoint as it is stored, `form` that of its weights, `dtype`
    what weights of 8 bits become, by torch's name. Raises `CheckpointError` that lists every weight
    of 8 bits that cannot be read.
    """
    if form is None:
        found = [unscaled_problems(name, headers[name], headers) for name in headers]
        raise_if_any([problem for problems in found for problem in problems])
        return dict(headers)
    if form.packed_bits is not None:
        headers = unpacked_headers(headers, form.packed_bits)
    scales = scales_of(headers, form)
    left_out = {*scales.values(), *filter(_OF_OTHERS.fullmatch, headers)}
    return {
        name: TensorHeader(header.shape, dtype) if name in scales else header
        for name, header in headers.items()
        if name not in left_out
    }


def scales_of(headers: Mapping[str, TensorHeader], form: ScaledForm) -> dict[str, str]:
    """Map the names of the weights of 8 bits to those of their scales.

    Raises `CheckpointError` that lists all that do not fit, and what else cannot be dense.
    """
    beside = {name: _companions(name, headers) for name in headers if _is_weight(name)}
    found = {name: scales[0] for name, scales in beside.items() if scales}
    problems: list[Problem] = []
    for name, scale in found.items():
        if len(beside[name]) > 1:
            value, rule = f"also {scale}", "a weight has one scale"
            problems.append(Problem(beside[name][1], value, rule, FETCH_AGAIN))
        else:
            problems += _pair_problems(name, headers[name], scale, headers[scale], form)
    known = {*found, *(scale for name in found for scale in beside[name])}
    modules = {name.rpartition(".")[0] for name in found}
    modules |= {module.rpartition(".")[0] for module in modules}
    for name in headers:
        if name not in known and _OF_OTHERS.fullmatch(name) is None:
            problems += _left_problems(name, headers, found, modules)
    raise_if_any(problems)
    return found


def unscaled_problems(name: str, header: TensorHeader, stored: Container[str]) -> Iterator[Problem]:
    """Yield what is wrong with a tensor that is read as it is: 8 bits stand for nothing so.

    Whole numbers may be anything but a weight. `stored` are the names of all tensors.
    """
    if _is_weight(name) and header.dtype.startswith((*_SMALL_FLOATS, *_SMALL_WHOLE)):
        value = f"{header.dtype} without a scale"
        if _companions(name, stored):
            value = f"{header.dtype} with a scale that config.json says nothing of"
        rule = "weights of 8 bits have a scale, and config.json a quantization_config that says so"
        yield Problem(name, value, rule, FROM_BEFORE)
    elif header.dtype.startswith(_SMALL_FLOATS):
        rule = "only *.weight, experts.gate_up_proj and experts.down_proj are of so few bits"
        yield Problem(name, header.dtype, rule, FROM_BEFORE)


def scale_shapes(name: str, shape: tuple[int, ...], form: ScaledForm) -> list[tuple[int, ...]]:
    """List the shapes that the scale of a weight [..., out, in] may have, the fullest first."""
    *before, rows, columns = shape
    grid = form.block.grid(rows, columns)
    allowed = [(*before, *grid)]
    if form.block.columns is None:
        allowed.append((*before, grid[0]))
    if form.block == (None, None):
        allowed.append((*before,))
        if (linears := linears_in(name)) > 1:
            allowed += [(*before, linears, 1), (*before, linears)]
    return allowed


def scaled_rows(name: str, shape: tuple[int, ...], scale: tuple[int, ...]) -> int:
    """How many rows of a weight have scales of their own: all, or those of each linear in it.

    `shape` is that of the weight [..., out, in], `scale` one of its `scale_shapes`.
    """
    rows, linears = shape[-2], linears_in(name)
    each = scale[len(shape) - 2 :][:1] == (linears,)
    return rows // linears if each else rows


def _is_weight(name: str) -> bool:
    return name.endswith(".weight") or is_fused(name)


def _companions(name: str, stored: Container[str]) -> list[str]:
    """The scales beside a tensor."""
    return [name + suffix for suffix in _SCALES if name + suffix in stored]


def _left_problems(
    name: str,
    headers: Mapping[str, TensorHeader],
    weights: Container[str],
    modules: Container[str],
) -> Iterator[Problem]:
    """What is wrong with a tensor that is neither read with a scale nor left out.

    `weights` are those of 8 bits, `modules` what holds them or their modules.
    """
    module, _, kind = name.rpartition(".")
    weight = next((name.removesuffix(one) for one in _SCALES if name.endswith(one)), "")
    of_quantization = _OF_WEIGHTS.fullmatch(kind) is not None or (
        kind.startswith("weight_") and f"{module}.weight" in weights
    )
    # What nobody knows would be written as a tensor of the dense model, which has no place for it.
    in_layer = module in modules and any(places_in_stacks(name))
    if _is_weight(weight):
        yield Problem(weight, "nothing", f"{kind} belongs to a weight", FETCH_AGAIN)
    elif of_quantization or (in_layer and kind.endswith(("_scale", "_zero_point", "_g_idx"))):
        rule = "beside a weight of 8 bits are one scale, and known ones of activations and caches"
        yield Problem(name, "an unknown tensor", rule, FROM_BEFORE)
    else:
        yield from unscaled_problems(name, headers[name], headers)


def _pair_problems(
    name: str, header: TensorHeader, scale: str, found: TensorHeader, form: ScaledForm
) -> Iterator[Problem]:
    """What is wrong with a weight and its scale."""
    if header.dtype != form.stored:
        rule = f"{form.stored or 'no 8 bits'}, by config.json, for a weight with a scale"
        yield Problem(name, header.dtype, rule, FROM_BEFORE)
    if found.dtype not in _SCALE_DTYPES:
        yield Problem(scale, found.dtype, f"one of {', '.join(_SCALE_DTYPES)}", FROM_BEFORE)
    if len(header.shape) < 2 or 0 in header.shape:
        rule = "a matrix, or one for each expert"
        yield Problem(name, f"shape {list(header.shape)}", rule, FROM_BEFORE)
        return
    linears, together = linears_in(name), form.block.rows or 1
    if linears > 1 and header.shape[-2] % (linears * together):
        # Blocks that began anew with the second linear may be as many as those of all rows.
        rule = f"{linears} linears of whole blocks of {together} rows"
        yield Problem(name, f"shape {list(header.shape)}", rule, FROM_BEFORE)
        return
    allowed = scale_shapes(name, header.shape, form)
    if found.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        rule = f"{shapes} for a weight of {list(header.shape)} in blocks of {_sizes(form)}"
        yield Problem(scale, f"shape {list(found.shape)}", rule, _NOT_READ)


def _sizes(form: ScaledForm) -> str:
    return " x ".join("all" if size is None else str(size) for size in form.block)
