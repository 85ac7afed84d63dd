"""Experts of a mixture as modules of their own, with linears named as checkpoints name them.

Transformers holds all experts of a block in two parameters of three dimensions, which it merges
from one tensor for each linear of each expert, and splits again when it saves. Here each linear is
an `nn.Linear` under the name of its tensor (`mlp.experts.3.gate_proj`, Mixtral's
`mlp.experts.3.w1`), so that whatever works on linears works on those of experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter

from permllm_vllm.checkpoint.errors import Problem

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""Linears of an expert where Transformers merges none."""
FUSED = {_GATE_UP, _DOWN}
"""Names under which Transformers holds a linear of all experts."""
_FORM = {"is_transposed": False, "is_concatenated": True, "has_bias": False}
"""What a module of fused experts says of itself where it says anything."""
_GATE = "_default_apply_gate"
"""The function by which Transformers multiplies the activated half of a product by the other."""


class Expert(nn.Module):
    """An MLP: `[tokens, hidden]` to the same.

    Args:
        linears: weights of gate, up and what reads their products, by the names of these.
        act_fn: what is done with a gate.
    """

    def __init__(self, linears: Mapping[str, Tensor], act_fn: nn.Module) -> None:
        super().__init__()
        for name, weight in linears.items():
            self.add_module(name, _linear(weight))
        self.act_fn = act_fn
        self._names = tuple(linears)

    def forward(self, states: Tensor) -> Tensor:
        """Multiply tokens, whatever the weight of their routes."""
        gate, up, down = map(self.get_submodule, self._names)
        output: Tensor = down(self.act_fn(gate(states)) * up(states))
        return output


class SeparateExperts(nn.ModuleList):
    """Stands in for the fused experts of a block; an expert runs where a token is routed to it.

    Args:
        fused: Transformers' module; the weights here are views of its parameters.
        names: of gate, up and what reads their products.
    """

    def __init__(self, fused: Any, names: Sequence[str]) -> None:
        super().__init__()
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True):
            weights = (*gate_up.chunk(2), down)
            self.append(Expert(dict(zip(names, weights, strict=True)), fused.act_fn))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum what the experts of each token give, times the weights of their routes.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], the experts of each token.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden], differentiable.
        """
        output = torch.zeros_like(hidden_states)
        for number in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == number)
            states = self[number](hidden_states[tokens])
            states = states * top_k_weights[tokens, places, None]
            output.index_add_(0, tokens, states.to(output.dtype))
        return output


def fused_experts(model: nn.Module) -> Iterator[str]:
    """Find the modules of a model that hold all experts of a block in parameters; their paths."""
    for path, module in model.named_modules():
        held = dict(module.named_parameters(recurse=False))
        if any(held[name].ndim == 3 for name in FUSED & held.keys()):
            yield path


def separate_experts(model: nn.Module) -> list[str]:
    """Put `SeparateExperts` in place of the fused experts of a model, without a copy of weights.

    Args:
        model: of Transformers, its parameters on any device, meta too.

    Returns:
        The paths of what was replaced.

    Raises:
        CheckpointError: experts of another form than two bias-free matrices around an activation.
    """
    paths = list(fused_experts(model))
    conversions = get_model_conversion_mapping(model) if paths else []
    for path in paths:
        fused = model.get_submodule(path)
        _check_form(path, fused)
        experts = SeparateExperts(fused, _stored_linears(path, conversions))
        model.set_submodule(path, experts.train(fused.training))
    return paths


def with_separate_experts(model_class: type[Any]) -> type[Any]:
    """Make a class whose models have separate experts before Transformers loads their weights.

    So each expert gets the tensors that were read, and nothing is merged. A loaded model may get
    its own class back.
    """

    def initialise(self: nn.Module, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, *arguments, **keywords)
        separate_experts(self)

    members = {"__init__": initialise, "__module__": model_class.__module__}
    return type(model_class.__name__, (model_class,), members)


def merges(conversion: Any, parameter: str) -> bool:
    """Whether a conversion of Transformers makes a parameter, given by its path, out of several."""
    return isinstance(conversion, WeightConverter) and any(
        parameter.endswith(target) for target in conversion.target_patterns
    )


def _stored_linears(path: str, conversions: Sequence[Any]) -> Sequence[str]:
    """What checkpoints call the linears of an expert, by what Transformers merges of them."""
    names = dict.fromkeys(
        pattern.removesuffix(".weight").rpartition(".")[2]
        for kind in (_GATE_UP, _DOWN)
        for conversion in conversions
        if merges(conversion, f"{path}.{kind}")
        for pattern in conversion.source_patterns
    )
    if len(names) not in (0, len(_LINEARS)):
        rule = f"Transformers merges {len(_LINEARS)} linears of each expert"
        remedy = "give a model of another family"
        raise Problem(path, f"merged from {', '.join(names)}", rule, remedy).as_error()
    return tuple(names) or _LINEARS


def _linear(weight: Tensor) -> nn.Linear:
    rows, columns = weight.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    return linear


def _check_form(path: str, fused: nn.Module) -> None:
    shapes = {name: tuple(one.shape) for name, one in fused.named_parameters(recurse=False)}
    gate_up, down = shapes.get(_GATE_UP, ()), shapes.get(_DOWN, ())
    fits = (
        shapes.keys() == {_GATE_UP, _DOWN}
        and len(down) == 3
        and gate_up == (down[0], 2 * down[2], down[1])
        and getattr(fused, "has_gate", True)
        and all(getattr(fused, name, value) == value for name, value in _FORM.items())
        and getattr(getattr(fused, "_apply_gate", None), "__name__", _GATE) == _GATE
    )
    if not fits:
        held = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        value = f"{type(fused).__name__} with {held}"
        rule = (
            f"experts are {_GATE_UP} [experts, 2 x inner, hidden], a gate before its product, and "
            f"{_DOWN} [experts, hidden, inner], without biases"
        )
        remedy = "give a model of another family"
        raise Problem(path, value, rule, remedy).as_error()
