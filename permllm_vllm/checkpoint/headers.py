"""The rules that names, shapes and dtypes must keep; no tensor is read for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import (
    BIAS,
    FOLDED_PERMUTATION,
    INPUT_PERMUTATION,
    SPARSE_KINDS,
    WEIGHT_MASK,
    WEIGHT_MULTIPLIER,
    WEIGHT_PACKED,
    WEIGHT_SCALE,
    QuantizationConfig,
    tensor_dtype,
    tensor_shape,
    value_kinds,
)
from permllm_vllm.checkpoint.stacks import Stack, holds_experts, places_in_stacks

WRITE_AGAIN = "write the checkpoint again with `permllm-offline prune`"
_ALIKE = f"{WRITE_AGAIN}, with all experts of the layer treated alike"
_OTHER_PATTERN = "prune with a --pattern of smaller groups, or leave this layer dense (--ignore)"
_FLOATING = ("bfloat16", "float16", "float32")
_LISTED_IN: dict[str, Literal["runtime_permuted", "folded"]] = {
    INPUT_PERMUTATION: "runtime_permuted",
    FOLDED_PERMUTATION: "folded",
}


class TensorHeader(NamedTuple):
    """What a safetensors header says of a tensor; `dtype` is torch's name without "torch."."""

    shape: tuple[int, ...]
    dtype: str


def natural_order(names: Iterable[str]) -> list[str]:
    """Sort names so that layer 2 comes before layer 10."""
    return sorted(names, key=lambda name: re.sub(r"[0-9]+", lambda m: m[0].zfill(20), name))


def sparse_modules(names: Iterable[str]) -> list[str]:
    """List the modules that have any tensor that only a sparse layer has, in natural order."""
    parts = (name.rpartition(".") for name in names)
    return natural_order({module for module, _, kind in parts if kind in SPARSE_KINDS})


def inside_modules(name: str) -> Iterator[tuple[str, str]]:
    """Split the name of a tensor at each of its dots: the modules around it, and what follows."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        yield ".".join(parts[:depth]), ".".join(parts[depth:])


def checkpoint_problems(
    headers: Mapping[str, TensorHeader], quantization: QuantizationConfig
) -> list[Problem]:
    """List every rule that the headers of a whole checkpoint break."""
    modules = sparse_modules(headers)
    children: dict[str, dict[str, TensorHeader]] = {module: {} for module in modules}
    for name, header in headers.items():
        for module, inside in inside_modules(name):
            if module in children:
                children[module][inside] = header
    problems = [
        problem
        for module in modules
        for problem in layer_problems(module, children[module], quantization)
    ]
    for kind, key in _LISTED_IN.items():
        problems += [
            Problem(f"{module}.{kind}", "nothing", f"{key} lists this module", WRITE_AGAIN)
            for module in getattr(quantization, key)
            if module not in children
        ]
    problems += [
        Problem(name, "a tensor", "absent lists its module, which the model lacks", WRITE_AGAIN)
        for name in headers
        if quantization.absent and quantization.lists("absent", name.rpartition(".")[0])
    ]
    if not modules:
        rule = f"a checkpoint of this format has at least one sparse layer (`*.{WEIGHT_PACKED}`)"
        problems.append(Problem("the checkpoint", "no sparse layer", rule, WRITE_AGAIN))
    problems += _incomplete_stacks(headers, modules, quantization)
    return [*problems, *_unlike_experts(modules, quantization)]


def layer_problems(
    module: str, tensors: Mapping[str, TensorHeader], quantization: QuantizationConfig
) -> list[Problem]:
    """List every rule that the headers of one sparse layer break.

    `tensors` maps what follows "module." in each tensor's name to its header.
    """
    problems = _name_problems(module, tensors, quantization)
    mask = tensors.get(WEIGHT_MASK)
    if mask is None:
        return problems
    if len(mask.shape) != 2 or 0 in mask.shape:
        rule = "[out, in / 8], neither of them 0"
        return [
            *problems,
            Problem(f"{module}.{WEIGHT_MASK}", f"shape {list(mask.shape)}", rule, WRITE_AGAIN),
        ]
    out_features, in_features = mask.shape[0], mask.shape[1] * 8
    pattern = Pattern.parse(quantization.pattern)
    if in_features % pattern.multiple:
        value = f"{in_features} inputs"
        rule = f"whole groups of {pattern.group}, since the pattern is {pattern}"
        problems.append(Problem(f"{module}.{WEIGHT_MASK}", value, rule, _OTHER_PATTERN))
    for kind, header in tensors.items():
        if kind not in (*SPARSE_KINDS, BIAS):
            continue
        shape = tensor_shape(kind, out_features, in_features, pattern, quantization.value_dtype)
        if header.shape != shape:
            rule = f"{list(shape)} where the mask is {list(mask.shape)} and the pattern {pattern}"
            value = f"shape {list(header.shape)}"
            problems.append(Problem(f"{module}.{kind}", value, rule, WRITE_AGAIN))
        dtype = tensor_dtype(kind, quantization.value_dtype)
        allowed = _FLOATING if dtype is None else (str(dtype).removeprefix("torch."),)
        if header.dtype not in allowed:
            rule = f"{' or '.join(allowed)} (value_dtype is {quantization.value_dtype})"
            problems.append(Problem(f"{module}.{kind}", header.dtype, rule, WRITE_AGAIN))
    block = quantization.block_size
    for kind in _LISTED_IN:
        if kind in tensors and in_features % block:
            rule = f"a permuted layer has a multiple of block_size {block} inputs"
            remedy = "prune with a smaller block_size, or leave this layer unpermuted"
            problems.append(Problem(f"{module}.{kind}", f"{in_features} inputs", rule, remedy))
    return problems


def _name_problems(
    module: str, tensors: Collection[str], quantization: QuantizationConfig
) -> list[Problem]:
    """Check which tensors a sparse layer has against each other and against the configuration."""
    problems = []

    def report(kind: str, value: str, rule: str, remedy: str = WRITE_AGAIN) -> None:
        problems.append(Problem(f"{module}.{kind}", value, rule, remedy))

    if quantization.is_ignored(module):
        rule = "`ignore` lists this module, so it is dense"
        report(WEIGHT_PACKED, "a sparse layer", rule, "take it out of `ignore`, or prune again")
    for kind in tensors:
        if kind == "weight":
            report(kind, "a second, dense weight", f"the weight is in {WEIGHT_PACKED} alone")
        elif kind not in (*SPARSE_KINDS, BIAS):
            known = ", ".join((*SPARSE_KINDS, BIAS))
            report(kind, "an unknown tensor", f"a sparse layer has {known} only")
    values = value_kinds(quantization.value_dtype)
    needed = [WEIGHT_MASK, *values]
    for kind in (WEIGHT_SCALE, WEIGHT_MULTIPLIER):
        if kind in tensors and kind not in values:
            report(kind, "a tensor", f"value_dtype {quantization.value_dtype} has none")
    for kind in needed:
        if kind not in tensors:
            report(kind, "nothing", f"a sparse layer has {', '.join(needed)}")
    if INPUT_PERMUTATION in tensors and FOLDED_PERMUTATION in tensors:
        rule = "a permutation is applied at run time or folded, never both"
        report(FOLDED_PERMUTATION, f"also {INPUT_PERMUTATION}", rule)
    for kind, key in _LISTED_IN.items():
        listed = quantization.lists(key, module)
        if listed and kind not in tensors:
            report(kind, "nothing", f"{key} lists this module")
        elif kind in tensors and not listed:
            report(kind, f"a module that {key} does not list", f"{key} lists every such module")
    return problems


def _incomplete_stacks(
    headers: Mapping[str, TensorHeader], modules: Collection[str], quantization: QuantizationConfig
) -> list[Problem]:
    """Find linears that are sparse in some decoder layers, or experts, and dense in others.

    Such a linear must be ignored there: whoever loads the model builds a sparse layer everywhere
    else and would wait for tensors that never come. The experts of a layer may be multiplied as
    one, so that none of their linears is dense where one is sparse, ignored or not.
    """
    stacks: dict[str, Stack] = {}
    wanted = {(place.stack, place.inside) for name in modules for place in places_in_stacks(name)}
    experts = {stack for stack, _ in wanted if holds_experts(stack)}
    for name, header in headers.items():
        for place in places_in_stacks(name):
            stacks.setdefault(place.stack, Stack()).add(place, len(header.shape))
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(header.shape) > 1:
            places = places_in_stacks(module)
            wanted |= {(place.stack, place.inside) for place in places if place.stack in experts}
    sparse = set(modules)
    problems: dict[str, Problem] = {}
    for prefix, inside in sorted(wanted, key=lambda one: (one[0] not in experts, one)):
        stack = stacks[prefix]
        for number in natural_order(stack.numbers):
            module = _join(prefix, number, inside)
            if module in sparse or module in problems or quantization.lists("absent", module):
                continue
            if prefix not in experts and quantization.is_ignored(module):
                continue
            if stack.is_of_another_kind(number, inside):
                continue
            value = "a dense weight" if f"{module}.weight" in headers else "nothing"
            rule = f"{prefix}.*.{inside} is sparse in others, so it is sparse or ignored here"
            remedy = f"{WRITE_AGAIN}, or list the module in `ignore` if it is meant to be dense"
            if prefix in experts:
                rule = f"{prefix}.* are sparse in every linear, or ignored in every one"
                remedy = _ALIKE
            problems[module] = Problem(f"{module}.{WEIGHT_PACKED}", value, rule, remedy)
    return list(problems.values())


def _unlike_experts(
    modules: Collection[str], quantization: QuantizationConfig
) -> Iterator[Problem]:
    """Find linears that are permuted in some experts of a layer and in others not."""
    alike: dict[tuple[str, str], list[str]] = {}
    for module in modules:
        for place in places_in_stacks(module):
            if holds_experts(place.stack):
                alike.setdefault((place.stack, place.inside), []).append(module)
    for kind, key in _LISTED_IN.items():
        listed = set(getattr(quantization, key))
        for (stack, inside), experts in alike.items():
            others = [module for module in experts if module not in listed]
            if 0 < len(others) < len(experts):
                value = f"{len(experts) - len(others)} of {len(experts)} experts in {key}"
                rule = f"{key} lists {stack}.*.{inside} of all experts, or of none"
                yield Problem(f"{others[0]}.{kind}", value, rule, _ALIKE)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)
