"""Experts: what the operator refuses."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.backends.weights import StackedWeights
from tests.kernels.test_experts import (
    CHOICES,
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    RELU2,
    SILU,
    inputs,
    layers,
    multiply,
    operands,
    routed,
    stacked,
)

ROWS, OUTPUTS, INPUTS, VALUE_TYPE, PLACE = 2, 3, 4, 5, 7
"""Fields of the metadata of an expert (csrc/cpu/packing/layout.h)."""
DENSE8 = 4
"""Number of a kind of values (csrc/cpu/packing/layout.h)."""
BAD = {
    "an expert that is not there": (2, torch.full((4, CHOICES), EXPERTS, dtype=torch.int32), "5"),
    "ids of another dtype": (2, torch.zeros(4, CHOICES, dtype=torch.int64), "topk_ids .*int32"),
    "ids of other tokens": (2, torch.zeros(3, CHOICES, dtype=torch.int32), r"must both be \[4"),
    "weights of another dtype": (1, torch.zeros(4, CHOICES).double(), "topk_weights .*float32"),
    "x with too many dimensions": (0, torch.zeros(1, 4, HIDDEN).bfloat16(), r"\[tokens, in\]"),
    "x of other inputs": (0, torch.zeros(4, HIDDEN + 8).bfloat16(), f"{HIDDEN} inputs"),
    "no metadata": (4, torch.zeros(EXPERTS, 3, dtype=torch.int64), "gate_up_metadata of shape"),
    "fewer experts": (8, torch.zeros(1, 8, dtype=torch.int64), "gate_up has 5 experts, down 1"),
    "bytes cut off": (3, torch.zeros(1, dtype=torch.uint8), "truncated or replaced|aligned"),
    "a scale for bfloat16": (6, torch.ones(EXPERTS, 2 * INTERMEDIATE), "scale of gate_up is given"),
    "a scale of another shape": (10, torch.ones(EXPERTS, 3), r"must be \[5, 256\]"),
    "a permutation of others": (5, torch.zeros(1, HIDDEN, dtype=torch.int32), r"must be \[5, 256"),
    "channels that are not there": (
        5,
        torch.full((EXPERTS, HIDDEN), HIDDEN, dtype=torch.int32),
        f"input index {HIDDEN}",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_operands_are_refused(case: str) -> None:
    place, tensor, message = BAD[case]
    gate_up, down = (stacked(CpuBackend("portable"), experts) for experts in layers())
    given = [inputs(4).bfloat16(), *routed(4), *operands(gate_up, down)]
    given[place] = tensor
    with pytest.raises(RuntimeError, match=message):
        torch.ops.permllm.sparse_experts(*given)


def test_an_unknown_activation_is_refused() -> None:
    packed = (stacked(CpuBackend("portable"), experts) for experts in layers())
    message = "activation is 3: 0 is silu, 1 is gelu with tanh, 2 is relu squared"
    with pytest.raises(RuntimeError, match=message):
        multiply(inputs(4).bfloat16(), *routed(4), *packed, 3)


MISPLACED = {
    "before the start": (0, PLACE, -64, "gate_up has .* of expert 0 at -64: it was truncated"),
    "past the end": (EXPERTS - 1, PLACE, 64, "expert 4 at .*: it was truncated"),
    "between lines": (EXPERTS - 1, PLACE, -8, "expert 4 at .*: it was truncated"),
    "of other outputs": (1, OUTPUTS, -8, "of expert 1 is 248 x 256, .* must be alike"),
    "of other inputs": (1, INPUTS, -8, "of expert 1 is 256 x 248, .* must be alike"),
}
"""By how much a number of an expert is off in the metadata, and what is said."""


def choosing(expert: int, gate_up: StackedWeights, down: StackedWeights) -> Tensor:
    """An answer of one expert alone."""
    ids = torch.full((4, CHOICES), expert, dtype=torch.int32)
    return multiply(inputs(4).bfloat16(), routed(4)[0], ids, gate_up, down)


@pytest.mark.parametrize("case", MISPLACED)
def test_metadata_of_a_chosen_expert_that_are_off_are_refused(case: str) -> None:
    expert, field, change, message = MISPLACED[case]
    gate_up, down = (stacked(CpuBackend("portable"), experts) for experts in layers())
    metadata = gate_up.metadata.clone()
    metadata[expert, field] += change
    choosing(expert, gate_up, down)
    with pytest.raises(RuntimeError, match=message):
        choosing(expert, replace(gate_up, metadata=metadata), down)


def test_a_last_expert_that_is_cut_off_is_refused() -> None:
    gate_up, down = (stacked(CpuBackend("portable"), experts) for experts in layers())
    cut = replace(gate_up, packed=gate_up.packed[:-64])
    with pytest.raises(RuntimeError, match=r"expert 4 at .*: it was truncated"):
        choosing(EXPERTS - 1, cut, down)


def test_dense_experts_are_refused(isa: str) -> None:
    backend = CpuBackend(isa)
    if not backend.rounds_dense(HIDDEN):
        pytest.skip(f"no kernel of {isa} reads dense rows")
    gate_up, down = (stacked(backend, experts) for experts in layers("int8"))
    metadata = gate_up.metadata.clone()
    metadata[0, VALUE_TYPE] = DENSE8
    metadata[0, ROWS] = 16 if isa == "amx" else 8
    with pytest.raises(RuntimeError, match="gate_up of expert 0 is dense: experts are sparse"):
        choosing(0, replace(gate_up, metadata=metadata), down)


def test_another_intermediate_size_is_refused() -> None:
    gate_up, down = (stacked(CpuBackend("portable"), experts) for experts in layers())
    given = [inputs(4).bfloat16(), *routed(4), *operands(gate_up, down)[:-1], INTERMEDIATE + 8]
    with pytest.raises(RuntimeError, match=f"is {INTERMEDIATE + 8}, down takes {INTERMEDIATE}"):
        torch.ops.permllm.sparse_experts(*given)


@pytest.mark.skipif("avx2" not in instruction_sets(), reason="one instruction set alone runs here")
def test_one_expert_of_another_instruction_set_is_refused() -> None:
    gate_up, down = layers()
    backends = [CpuBackend("avx2" if expert == 1 else "portable") for expert in range(EXPERTS)]
    mixed = backends[0].stack(
        [one.pack(layer.weights) for one, layer in zip(backends, gate_up, strict=True)]
    )
    with pytest.raises(RuntimeError, match=r"gate_up of expert 1 .* packed for one instruction"):
        choosing(1, mixed, stacked(backends[0], down))


@pytest.mark.skipif("avx2" not in instruction_sets(), reason="one instruction set alone runs here")
def test_stacks_of_two_instruction_sets_are_refused() -> None:
    gate_up, down = layers()
    both = stacked(CpuBackend("portable"), gate_up), stacked(CpuBackend("avx2"), down)
    with pytest.raises(RuntimeError, match=r"gate_up was packed for .* portable, down for avx2"):
        multiply(inputs(4).bfloat16(), *routed(4), *both)


def test_layers_that_do_not_fit_are_refused() -> None:
    gate_up, _ = (stacked(CpuBackend("portable"), experts) for experts in layers())
    given = [inputs(4).bfloat16(), *routed(4), *operands(gate_up, gate_up)]
    with pytest.raises(RuntimeError, match="does not fit down"):
        torch.ops.permllm.sparse_experts(*given)


@pytest.mark.parametrize(("gated", "activation"), [(True, RELU2), (False, SILU)])
def test_an_activation_of_another_form_is_refused(gated: bool, activation: int) -> None:
    packed = (stacked(CpuBackend("portable"), experts) for experts in layers(gated=gated))
    with pytest.raises(RuntimeError, match="without a gate" if gated else "gate and up"):
        multiply(inputs(4).bfloat16(), *routed(4), *packed, activation)
