"""Which scale belongs to which weight of 8 bits, and the headers of the dense model they make."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.fused_experts import is_fused
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled_form import FROM_BEFORE, ScaledForm

_SCALES = ("_scale_inv", "_scale")
"""What the name of a scale adds to that of its weight; both multiply."""
_OF_ACTIVATIONS = ("activation_scale", "input_scale", "output_scale")
_OF_CACHES = ("q_scale", "k_scale", "v_scale")
_ZERO_POINTS = ("input_zero_point", "output_zero_point")
_EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2", "int8", "uint8")
_SCALE_DTYPES = ("float32", "bfloat16", "float16")


def dense_headers(
    headers: Mapping[str, TensorHeader], form: ScaledForm | None, dtype: str
) -> dict[str, TensorHeader]:
    """Return the headers of the dense model that stored tensors stand for, scales left out.

    `headers` are those of a whole checkpoint as it is stored, `form` that of its weights, `dtype`
    what weights of 8 bits become, by torch's name. Raises `CheckpointError` that lists every weight
    of 8 bits that cannot be read.
    """
    if form is None:
        raise_if_any([one for name in headers for one in unscaled_problems(name, headers[name])])
        return dict(headers)
    scales = scales_of(headers, form)
    left_out = {*scales.values(), *filter(_is_of_activations, headers)}
    return {
        name: TensorHeader(header.shape, dtype) if name in scales else header
        for name, header in headers.items()
        if name not in left_out
    }


def scales_of(headers: Mapping[str, TensorHeader], form: ScaledForm) -> dict[str, str]:
    """Map the names of the weights of 8 bits to those of their scales.

    Raises `CheckpointError` that lists all that do not fit.
    """
    found: dict[str, str] = {}
    problems: list[Problem] = []
    for name, header in headers.items():
        if not _is_weight(name):
            problems += _companion_problems(name, headers)
            continue
        scales = [name + suffix for suffix in _SCALES if name + suffix in headers]
        if not scales:
            problems += unscaled_problems(name, header)
        elif len(scales) > 1:
            value, rule = f"also {scales[0]}", "a weight has one scale"
            problems.append(Problem(scales[1], value, rule, FETCH_AGAIN))
        else:
            found[name] = scales[0]
            problems += _pair_problems(name, header, scales[0], headers[scales[0]], form)
    raise_if_any(problems)
    return found


def unscaled_problems(name: str, header: TensorHeader) -> Iterator[Problem]:
    """Yield what is wrong with a tensor that has no scale: a weight of 8 bits needs one."""
    if _is_weight(name) and header.dtype in _EIGHT_BITS:
        rule = "weights of 8 bits have a scale, and config.json a quantization_config that says so"
        yield Problem(name, f"{header.dtype} without a scale", rule, FROM_BEFORE)


def _is_weight(name: str) -> bool:
    return name.endswith(".weight") or is_fused(name)


def _is_of_activations(name: str) -> bool:
    kind = name.rpartition(".")[2]
    return kind in (*_OF_CACHES, *_ZERO_POINTS) or kind.endswith(_OF_ACTIVATIONS)


def _companion_problems(name: str, headers: Mapping[str, TensorHeader]) -> Iterator[Problem]:
    """What is wrong with a tensor that is no weight, but may belong to one."""
    module, _, kind = name.rpartition(".")
    if not kind.startswith("weight_"):
        return
    if kind not in [f"weight{suffix}" for suffix in _SCALES]:
        rule = f"a weight of 8 bits has weight{' or weight'.join(_SCALES)} alone"
        yield Problem(name, "an unknown tensor", rule, FROM_BEFORE)
    elif f"{module}.weight" not in headers:
        yield Problem(f"{module}.weight", "nothing", f"{kind} belongs to a weight", FETCH_AGAIN)


def _pair_problems(
    name: str, header: TensorHeader, scale: str, found: TensorHeader, form: ScaledForm
) -> Iterator[Problem]:
    """What is wrong with a weight and its scale."""
    if header.dtype != form.stored:
        rule = f"{form.stored}, by config.json, for a weight with a scale"
        yield Problem(name, header.dtype, rule, FROM_BEFORE)
    if found.dtype not in _SCALE_DTYPES:
        yield Problem(scale, found.dtype, f"one of {', '.join(_SCALE_DTYPES)}", FROM_BEFORE)
    if len(header.shape) < 2 or 0 in header.shape:
        rule = "a matrix, or one for each expert"
        yield Problem(name, f"shape {list(header.shape)}", rule, FROM_BEFORE)
        return
    allowed = scale_shapes(header.shape, form)
    if found.shape not in allowed:
        shapes = " or ".join(str(list(shape)) for shape in allowed)
        rule = f"{shapes} for a weight of {list(header.shape)} in blocks of {_sizes(form)}"
        yield Problem(scale, f"shape {list(found.shape)}", rule, FETCH_AGAIN)


def scale_shapes(shape: tuple[int, ...], form: ScaledForm) -> list[tuple[int, ...]]:
    """List the shapes that the scale of a weight [..., out, in] may have, the fullest first."""
    *before, rows, columns = shape
    grid = form.block.grid(rows, columns)
    allowed = [(*before, *grid)]
    if form.block.columns is None:
        allowed.append((*before, grid[0]))
    if form.block == (None, None):
        allowed.append((*before,))
    return allowed


def _sizes(form: ScaledForm) -> str:
    return " x ".join("all" if size is None else str(size) for size in form.block)
