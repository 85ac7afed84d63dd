"""What belongs to weights of 8 bits, what is left out beside them, and what is refused."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled_form import OF_CACHES_ALONE, ScaledForm
from permllm_vllm.checkpoint.scaled_headers import dense_headers
from tests.checkpoint.scaled_files import EXPERTS, FORM, LAYER, UP, headers_of, open_with, pair

OF_OTHERS = [
    f"{LAYER}.self_attn.{kind}"
    for kind in ("q_scale", "k_scale", "v_scale", "kv_scale", "prob_scale", "attn.k_scale")
]
OF_OTHERS += [f"{LAYER}.self_attn.{one}_zero_point" for one in ("q", "k", "v")]
OF_OTHERS += [f"{LAYER}.self_attn.{one}_cache.scale" for one in ("k", "v")]
OF_OTHERS += [f"{LAYER}.self_attn.k_proj.{kind}" for kind in ("k_scale", "output_scale")]
OF_OTHERS += [
    f"{UP}.{kind}"
    for kind in (
        *("input_scale", "input_global_scale", "input_zero_point", "input_g_idx"),
        *("output_scale", "output_global_scale", "output_zero_point", "activation_scale"),
    )
]
OF_OTHERS += [f"{EXPERTS}.gate_up_proj_activation_scale", f"{EXPERTS}.down_proj_input_scale"]


@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.parametrize("form", [FORM, OF_CACHES_ALONE])
def test_what_belongs_to_activations_and_caches_is_left_out(
    name: str, form: ScaledForm, tmp_path: Path
) -> None:
    up, scale, _ = pair(10, 8)
    tensors = {f"{UP}.weight": up, f"{UP}.weight_scale": scale}
    if form == OF_CACHES_ALONE:
        tensors = {f"{UP}.weight": torch.ones(10, 8)}
    for one in (torch.tensor(2.0), torch.tensor([2.0]).to(torch.float8_e4m3fn)):
        found = open_with(tensors | {name: one}, tmp_path, form)
        assert found.names() == [f"{UP}.weight"]
        with pytest.raises(CheckpointError, match=r"found nothing in .*only stored tensors"):
            found.tensor(name)


@pytest.mark.parametrize(
    "name",
    [
        *(f"{LAYER}.router.per_expert_scale", "model.tower.layers.0.conv.weight_g"),
        *("vision.logit_scale", f"{LAYER}.layer_scalar", "proj.output.scale"),
    ],
)
def test_what_dense_models_have_is_kept(name: str, tmp_path: Path) -> None:
    up, scale, _ = pair(10, 8)
    tensors = {f"{UP}.weight": up, f"{UP}.weight_scale": scale, name: torch.ones(3)}
    assert torch.equal(open_with(tensors, tmp_path).tensor(name), torch.ones(3))


FLOAT8 = torch.ones(10, 8).to(torch.float8_e4m3fn)
GRID = torch.ones(3, 3)
JOINED = torch.ones(1, 14, 8).to(torch.float8_e4m3fn)
"""Two linears of 7 rows: in blocks of 4, both together have as many as each for itself."""


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{UP}.weight": FLOAT8}, "up_proj.weight: found float8_e4m3fn without a scale; rule: we"),
        ({f"{EXPERTS}.down_proj": FLOAT8.view(2, 5, 8)}, "experts.down_proj: found float8_e4m3fn"),
        ({f"{UP}.weight_scale": GRID}, "up_proj.weight: found nothing; rule: weight_scale belongs"),
        (
            {f"{EXPERTS}.down_proj_scale_inv": GRID},
            "experts.down_proj: found nothing; rule: down_proj_scale_inv belongs to a weight",
        ),
        (
            {f"{EXPERTS}.up_proj": FLOAT8.view(2, 5, 8), f"{EXPERTS}.up_proj_scale_inv": GRID},
            r"experts.up_proj: found float8_e4m3fn; rule: only \*.weight, experts.gate_up_proj and",
        ),
        ({f"{EXPERTS}.up_proj_scale_inv": GRID}, "up_proj_scale_inv: found an unknown tensor"),
        ({f"{LAYER}.table": FLOAT8}, "layers.0.table: found float8_e4m3fn; rule: only"),
        ({"table": FLOAT8.float().to(torch.float8_e5m2)}, "table: found float8_e5m2; rule: only"),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.extra_scale": GRID},
            "up_proj.extra_scale: found an unknown tensor; rule: beside a weight of 8 bits are one",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{LAYER}.mlp.any_scale": GRID},
            "mlp.any_scale: found an unknown tensor",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.weight_norm": GRID},
            "weight_norm: found an unknown tensor",
        ),
        ({f"{UP}.weight_packed": GRID}, "weight_packed: found an unknown tensor"),
        (
            {
                f"{EXPERTS}.gate_up_proj": JOINED,
                f"{EXPERTS}.gate_up_proj_scale": torch.ones(1, 4, 3),
            },
            r"gate_up_proj: found shape \[1, 14, 8\]; rule: 2 linears of whole blocks of 4 rows",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.weight_scale_inv": GRID},
            "weight_scale: found also .*weight_scale_inv; rule: a weight has one scale",
        ),
        (
            {f"{UP}.weight": FLOAT8.bfloat16(), f"{UP}.weight_scale": GRID},
            "up_proj.weight: found bfloat16; rule: float8_e4m3fn, by config.json",
        ),
        (
            {f"{UP}.weight": FLOAT8.float().to(torch.float8_e5m2), f"{UP}.weight_scale": GRID},
            "up_proj.weight: found float8_e5m2",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID.to(torch.uint8)},
            "weight_scale: found uint8; rule: one of float32, bfloat16, float16",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": torch.ones(3, 2)},
            r"found shape \[3, 2\]; rule: \[3, 3\] for a weight of \[10, 8\] in blocks of 4 x 3; "
            "remedy: fetch .* again; .*form is not read: give the model from before",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": torch.tensor(1.0)},
            r"weight_scale: found shape \[\]; rule: \[3, 3\]",
        ),
        (
            {f"{UP}.weight": FLOAT8[0].clone(), f"{UP}.weight_scale": torch.ones(3)},
            r"up_proj.weight: found shape \[8\]; rule: a matrix",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.weight_zero_point": GRID},
            "weight_zero_point: found an unknown tensor",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_at_once(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_with({"model.norm.weight": torch.ones(2)} | tensors, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        (f"{UP}.weight", (), "without a scale"),
        (f"{UP}.weight", (f"{UP}.weight_scale",), "with a scale that config.json says nothing of"),
        (
            f"{EXPERTS}.0.up_proj.weight",
            (f"{EXPERTS}.gate_up_proj_scale",),
            "with a scale that con",
        ),
    ],
    ids=["none", "unsaid", "fused"],
)
def test_without_a_form_they_are_no_dense_weights(
    name: str, more: tuple[str, ...], said: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """As of tools that say of their quantization in a file of their own."""
    stored = f"{EXPERTS}.gate_up_proj" if "experts" in name else name
    weight = torch.ones(2, 2, 2) if "experts" in name else torch.ones(2, 2)
    tensors = {stored: weight.to(dtype)} | {one: torch.ones(()) for one in more}
    message = rf"{stored}: found \w+ {said}.*; rule: .* a quantization_config"
    with pytest.raises(CheckpointError, match=message):
        dense_headers(headers_of(tensors), None, "bfloat16")
    with pytest.raises(CheckpointError, match=message):
        open_with(tensors, tmp_path, None, experts_under="model.layers.").tensor(name)


def test_without_a_form_small_floats_are_nothing_by_any_name(tmp_path: Path) -> None:
    tensors = {f"{EXPERTS}.up_proj": FLOAT8, "counts": torch.ones(3, dtype=torch.int8)}
    found = open_with(tensors, tmp_path, None)
    assert found.tensor("counts").dtype == torch.int8
    with pytest.raises(CheckpointError, match="up_proj: found float8_e4m3fn; rule: only"):
        found.tensor(f"{EXPERTS}.up_proj")


@pytest.mark.parametrize("dtype", ["F8_E8M0", "F4", "F6_E2M3", "F8_E4M3FNUZ", "float8_e5m2"])
@pytest.mark.parametrize("form", [FORM, None])
def test_dtypes_that_stand_for_nothing(dtype: str, form: ScaledForm | None) -> None:
    with pytest.raises(CheckpointError, match=f"table: found {dtype}; rule: only"):
        dense_headers({"model.table": TensorHeader((2, 2), dtype)}, form, "bfloat16")
    with pytest.raises(CheckpointError, match=f"found {dtype} without a scale"):
        dense_headers({f"{UP}.weight": TensorHeader((2, 2), dtype)}, form, "bfloat16")


def test_of_caches_alone_no_weight_has_a_scale() -> None:
    stored = headers_of({f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": torch.ones(1)})
    with pytest.raises(CheckpointError, match="found float8_e4m3fn; rule: no 8 bits, by config"):
        dense_headers(stored, OF_CACHES_ALONE, "bfloat16")
