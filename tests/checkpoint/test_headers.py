from collections.abc import Callable
from typing import Any

import pytest

from permllm_vllm.checkpoint.headers import TensorHeader, checkpoint_problems, natural_order
from permllm_vllm.checkpoint.schema import QuantizationConfig

LAYER = "model.layers.0.mlp"
UP, DOWN, OUT = f"{LAYER}.up_proj", f"{LAYER}.down_proj", "model.layers.0.self_attn.o_proj"


def headers_of(model: Any) -> dict[str, TensorHeader]:
    return {
        name: TensorHeader(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in model.tensors.items()
    }


def problems_of(
    model: Any, change: Callable[[dict[str, TensorHeader]], Any], **settings: Any
) -> list[str]:
    headers = headers_of(model)
    change(headers)
    quantization = QuantizationConfig(**{**model.quantization.to_dict(), **settings})
    return [str(problem) for problem in checkpoint_problems(headers, quantization)]


def nothing(headers: dict[str, TensorHeader]) -> None:
    return None


def without(*names: str) -> Callable[[dict[str, TensorHeader]], None]:
    def change(headers: dict[str, TensorHeader]) -> None:
        for name in names:
            del headers[name]

    return change


def having(name: str, shape: tuple[int, ...], dtype: str) -> Callable[..., None]:
    def change(headers: dict[str, TensorHeader]) -> None:
        headers[name] = TensorHeader(shape, dtype)

    return change


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_a_valid_checkpoint_has_no_problems(
    make_tiny_model: Callable[[str, str], Any], pattern: str, dtype: str
) -> None:
    assert problems_of(make_tiny_model(pattern, dtype), nothing) == []


@pytest.mark.parametrize(("pattern", "group"), [("8:16", 16), ("32:64", 64)])
def test_a_tail_of_a_group_is_refused(
    make_tiny_model: Callable[[str, str], Any], pattern: str, group: int
) -> None:
    """The 40 inputs of one layer; those of the others are whole groups."""
    found = problems_of(make_tiny_model("2:4", "bfloat16"), nothing, pattern=pattern)
    assert len(found) == 2
    for problem in found:
        assert f"found 40 inputs; rule: whole groups of {group}" in problem
        assert "--pattern of smaller groups" in problem


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without(f"{UP}.weight_mask"), f"{UP}.weight_mask: found nothing"),
        (without(f"{UP}.weight_packed"), f"{UP}.weight_packed: found nothing"),
        (without(f"{UP}.input_permutation"), "runtime_permuted lists this module"),
        (without(f"{DOWN}.folded_permutation"), "folded lists this module"),
        (having(f"{UP}.weight", (128, 64), "bfloat16"), "found a second, dense weight"),
        (having(f"{UP}.g_idx", (64,), "int32"), f"{UP}.g_idx: found an unknown tensor"),
        (having(f"{UP}.lora.a", (64,), "int32"), f"{UP}.lora.a: found an unknown tensor"),
        (having(f"{UP}.weight_scale", (128,), "float32"), "value_dtype bfloat16 has none"),
        (having(f"{UP}.weight_multiplier", (128, 1), "uint8"), "value_dtype bfloat16 has none"),
        (having(f"{UP}.weight_packed", (128, 31), "bfloat16"), "shape [128, 31]; rule: [128, 32]"),
        (having(f"{UP}.weight_packed", (128, 32), "float16"), "float16; rule: bfloat16 (value"),
        (having(f"{UP}.weight_mask", (128, 8), "int8"), "found int8; rule: uint8"),
        (having(f"{UP}.weight_mask", (0, 8), "uint8"), "neither of them 0"),
        (having(f"{UP}.weight_mask", (1024,), "uint8"), "rule: [out, in / 8]"),
        (having(f"{UP}.input_permutation", (32,), "uint8"), "shape [32]; rule: [64]"),
        (having(f"{UP}.input_permutation", (64,), "int64"), "found int64; rule: uint8"),
        (having(f"{UP}.bias", (64,), "bfloat16"), "shape [64]; rule: [128]"),
        (having(f"{UP}.bias", (128,), "int64"), "rule: bfloat16 or float16 or float32"),
        (having(f"{OUT}.input_permutation", (40,), "uint8"), "runtime_permuted does not list"),
        (having(f"{OUT}.folded_permutation", (40,), "uint8"), "multiple of block_size 32"),
        (having(f"{UP}.folded_permutation", (64,), "uint8"), "at run time or folded, never both"),
    ],
)
def test_each_broken_rule_is_reported(
    tiny_model: Any, change: Callable[..., None], expected: str
) -> None:
    problems = problems_of(tiny_model, change)
    assert any(expected in problem for problem in problems), problems
    assert all("remedy: " in problem for problem in problems)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"ignore": [OUT]}, f"{OUT}.weight_packed: found a sparse layer; rule: `ignore`"),
        ({"ignore": [r"re:.*\.o_proj"]}, f"{OUT}.weight_packed: found a sparse layer"),
        ({"runtime_permuted": []}, f"{UP}.input_permutation: found a module that runtime_perm"),
        ({"folded": []}, f"{DOWN}.folded_permutation: found a module that folded does not list"),
        ({"folded": ["absent", DOWN]}, "absent.folded_permutation: found nothing"),
        ({"value_dtype": "int8"}, f"{UP}.weight_scale: found nothing"),
        ({"value_dtype": "int4", "format_version": 2}, f"{UP}.weight_multiplier: found nothing"),
        ({"value_dtype": "int4", "format_version": 2}, "found shape [128, 32]; rule: [128, 16]"),
        ({"block_size": 128}, f"{UP}.input_permutation: found 64 inputs"),
        ({"pattern": "2:4", "value_dtype": "float16"}, "found bfloat16; rule: float16"),
    ],
)
def test_a_configuration_that_disagrees_is_reported(
    tiny_model: Any, settings: dict[str, Any], expected: str
) -> None:
    problems = problems_of(tiny_model, nothing, **settings)
    assert any(expected in problem for problem in problems), problems


def test_a_linear_is_sparse_or_ignored_in_every_decoder_layer(tiny_model: Any) -> None:
    second = "model.layers.1.self_attn.o_proj"
    parts = [f"{second}.weight_packed", f"{second}.weight_mask"]
    absent = problems_of(tiny_model, without(*parts))
    assert len(absent) == 1
    assert (
        f"{second}.weight_packed: found nothing; rule: model.layers.*.self_attn.o_proj" in absent[0]
    )

    def dense(headers: dict[str, TensorHeader]) -> None:
        without(*parts)(headers)
        having(f"{second}.weight", (64, 40), "bfloat16")(headers)

    assert "found a dense weight" in problems_of(tiny_model, dense)[0]
    assert problems_of(tiny_model, dense, ignore=["lm_head", second]) == []


def test_layers_of_hybrid_models_are_of_several_kinds(tiny_model: Any) -> None:
    def another_kind(headers: dict[str, TensorHeader]) -> None:
        for name in [name for name in headers if name.startswith("model.layers.1.self_attn.")]:
            del headers[name]
        having("model.layers.1.linear_attn.out_proj.weight", (64, 40), "bfloat16")(headers)

    assert problems_of(tiny_model, another_kind) == []

    def half_of_one(headers: dict[str, TensorHeader]) -> None:
        another_kind(headers)
        having("model.layers.1.self_attn.q_norm.weight", (64,), "bfloat16")(headers)

    (problem,) = problems_of(tiny_model, half_of_one)
    assert problem.startswith("model.layers.1.self_attn.o_proj.weight_packed: found nothing")


SHARED = "input_layernorm"


MIXED = QuantizationConfig(
    pattern="2:4", block_size=64, value_dtype="bfloat16", ignore=["re:.*\\.mlp\\.gate"]
)


def mixture() -> dict[str, TensorHeader]:
    """Three layers: experts, a dense MLP, experts; all sparse, the router of one row for each."""
    headers: dict[str, TensorHeader] = {}
    for layer in range(3):
        names = ["mlp.gate_proj", "mlp.down_proj"]
        if layer != 1:
            headers[f"model.layers.{layer}.mlp.gate.weight"] = TensorHeader((3, 64), "bfloat16")
            names = [f"mlp.experts.{expert}.{name}" for expert in range(3) for name in EXPERT]
        for name in [*names, "self_attn.o_proj"]:
            module = f"model.layers.{layer}.{name}"
            headers[f"{module}.weight_packed"] = TensorHeader((64, 32), "bfloat16")
            headers[f"{module}.weight_mask"] = TensorHeader((64, 8), "uint8")
    return headers


EXPERT = ("gate_proj", "down_proj")


def test_a_layer_may_lack_what_absent_lists() -> None:
    module = "model.layers.1.self_attn.o_proj"
    (problem,) = mixture_problems(module)
    assert problem.startswith(f"{module}.weight_packed: found nothing")
    assert mixture_problems(module, absent=[module]) == []
    (problem,) = mixture_problems(module, dense=True, absent=[module])
    assert problem.startswith(f"{module}.weight: found a tensor; rule: absent lists its module")


def mixture_problems(*lost: str, dense: bool = False, **settings: Any) -> list[str]:
    """What is wrong where some modules have no tensors, or dense weights."""
    headers = mixture()
    for module in lost:
        for kind in ("weight_packed", "weight_mask"):
            del headers[f"{module}.{kind}"]
        if dense:
            headers[f"{module}.weight"] = TensorHeader((64, 64), "bfloat16")
    for key, kind in (("runtime_permuted", "input"), ("folded", "folded")):
        for module in settings.get(key, []):
            headers[f"{module}.{kind}_permutation"] = TensorHeader((64,), "uint8")
    quantization = QuantizationConfig(**(MIXED.to_dict() | settings))
    return [str(problem) for problem in checkpoint_problems(headers, quantization)]


def experts_of(layer: int, *names: str) -> list[str]:
    prefix = f"model.layers.{layer}.mlp.experts"
    return [f"{prefix}.{expert}.{name}" for expert in range(3) for name in names]


def test_layers_with_experts_and_layers_without_are_of_two_kinds() -> None:
    assert mixture_problems() == []


@pytest.mark.parametrize("dense", [False, True])
def test_every_expert_is_sparse_or_ignored(dense: bool) -> None:
    found = "a dense weight" if dense else "nothing"
    up = "model.layers.2.mlp.experts.1.gate_proj"
    (problem,) = mixture_problems(up, dense=dense)
    assert problem.startswith(f"{up}.weight_packed: found {found}; rule: model.layers.2.mlp.exp")
    everywhere = [f"model.layers.{layer}.mlp.experts.1.gate_proj" for layer in (0, 2)]
    problems = mixture_problems(*everywhere, dense=dense)
    assert len(problems) == 2
    assert all(
        "experts.* are sparse in every linear, or ignored" in problem for problem in problems
    )
    whole = [f"model.layers.2.mlp.experts.1.{name}" for name in EXPERT]
    assert len(mixture_problems(*whole, dense=dense)) == 2


def test_some_experts_of_a_layer_cannot_be_ignored() -> None:
    lost = [f"model.layers.2.mlp.experts.1.{name}" for name in EXPERT]
    problems = mixture_problems(*lost, dense=True, ignore=[*MIXED.ignore, *lost])
    assert [problem.partition(":")[0] for problem in problems] == [
        f"{name}.weight_packed" for name in sorted(lost)
    ]
    assert all("ignored in every one" in problem for problem in problems)


def test_one_linear_of_all_experts_cannot_be_ignored() -> None:
    for ignored in (experts_of(2, "down_proj"), experts_of(0, "down_proj")):
        problems = mixture_problems(*ignored, dense=True, ignore=[*MIXED.ignore, *ignored])
        assert len(problems) == len(ignored)
    everywhere = experts_of(0, "down_proj") + experts_of(2, "down_proj")
    problems = mixture_problems(*everywhere, dense=True, ignore=["re:.*down_proj", *MIXED.ignore])
    assert sum("ignored in every one" in problem for problem in problems) == len(everywhere)


@pytest.mark.parametrize("entries", [experts_of(2, *EXPERT), [r"re:model\.layers\.2\..*experts.*"]])
def test_all_experts_of_a_layer_can_be_ignored(entries: list[str]) -> None:
    lost = experts_of(2, *EXPERT)
    assert mixture_problems(*lost, dense=True, ignore=[*MIXED.ignore, *entries]) == []
    assert len(mixture_problems(*lost, dense=True)) == len(lost)


@pytest.mark.parametrize("key", ["runtime_permuted", "folded"])
def test_experts_are_permuted_alike(key: str) -> None:
    alike = experts_of(0, "gate_proj") + experts_of(2, "down_proj")
    assert mixture_problems(**{key: alike}) == []
    kind = {"runtime_permuted": "input_permutation", "folded": "folded_permutation"}[key]
    (problem,) = mixture_problems(**{key: alike[1:]})
    assert problem.startswith(f"{alike[0]}.{kind}: found 2 of 3 experts in {key}; rule: {key} list")
    assert len(mixture_problems(**{key: alike[1:-1]})) == 2


def test_some_folded_and_some_at_run_time_are_not_alike() -> None:
    down = experts_of(0, "down_proj")
    assert len(mixture_problems(folded=down[:1], runtime_permuted=down[1:])) == 2


def test_a_layer_without_any_matrix_is_of_another_kind_by_what_else_it_has(
    tiny_model: Any,
) -> None:
    def only(child: str) -> Callable[[dict[str, TensorHeader]], None]:
        def change(headers: dict[str, TensorHeader]) -> None:
            for name in [name for name in headers if name.startswith("model.layers.1.")]:
                del headers[name]
            having(f"model.layers.0.{SHARED}.weight", (64,), "bfloat16")(headers)
            having(f"model.layers.1.{child}.weight", (64,), "bfloat16")(headers)

        return change

    settings = {"runtime_permuted": [UP], "folded": [DOWN]}
    assert problems_of(tiny_model, only("norm"), **settings) == []
    assert len(problems_of(tiny_model, only(SHARED), **settings)) == 3


def test_a_dense_mlp_that_lacks_a_linear_is_reported() -> None:
    headers = mixture()
    for layer in (0, 2):  # these have a dense MLP too
        for name in [name for name in headers if name.startswith(f"model.layers.{layer}.mlp.")]:
            del headers[name]
        for name, header in list(headers.items()):
            if name.startswith("model.layers.1.mlp."):
                headers[name.replace("layers.1", f"layers.{layer}")] = header
    for kind in ("weight_packed", "weight_mask"):
        del headers[f"model.layers.2.mlp.gate_proj.{kind}"]
    (problem,) = checkpoint_problems(headers, MIXED)
    assert problem.tensor == "model.layers.2.mlp.gate_proj.weight_packed"


def test_a_checkpoint_without_sparse_layers_is_reported(tiny_model: Any) -> None:
    def dense_only(headers: dict[str, TensorHeader]) -> None:
        for name in [name for name in headers if "layers" in name]:
            del headers[name]

    problems = problems_of(tiny_model, dense_only, runtime_permuted=[], folded=[])
    assert problems[0].startswith("the checkpoint: found no sparse layer")


def test_natural_order_survives_odd_names() -> None:
    names = ["a.10.x", "a.2.x", "a.2.b", "²", "7", "a." + "9" * 5000, "", "..", "a.٣"]
    assert natural_order(names)[:3] == ["", "..", "7"]
    assert natural_order(["a.10.x", "a.2.x", "a.2.b"]) == ["a.2.b", "a.2.x", "a.10.x"]
    odd = {f"{name}.weight_mask": TensorHeader((1, 1), "uint8") for name in names}
    config = QuantizationConfig(pattern="2:4", block_size=64, value_dtype="int8")
    assert len(checkpoint_problems(odd, config)) >= len(names)
