"""Experts as vLLM builds and fills them: what comes in, what is refused, what is cut to a rank."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import LoRAConfig, VllmConfig
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.fused_moe import config as moe_config
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.quantization import weight_files
from permllm_vllm.quantization.experts import PermLLMExpertsMethod, _require_supported
from tests.quantization.sparse_modules import (
    SparseModule,
    config,
    int4_module,
    permutation,
    sparse_module,
)

EXPERTS, CHOICES, HIDDEN, INTERMEDIATE = 3, 2, 128, 128
PREFIX = "model.layers.0.mlp.experts"
LEAVES = ("gate_proj", "up_proj", "down_proj")
NAMES = [f"{PREFIX}.{expert}.{leaf}" for expert in range(EXPERTS) for leaf in LEAVES]
GATE_UP = [name for name in NAMES if "down" not in name]
DOWN = [name for name in NAMES if "down" in name]
Modules = dict[str, SparseModule]


@cache
def modules(
    *,
    dtype: torch.dtype = torch.bfloat16,
    down: str = "folded_permutation",
    seed: int = 0,
    kept: int = 2,
) -> Modules:
    """Gate and up share a run-time permutation; that of down is folded, or not."""
    made = {}
    for number, name in enumerate(NAMES):
        expert = number // len(LEAVES)
        made[name] = sparse_module(
            HIDDEN if "down" in name else INTERMEDIATE,
            INTERMEDIATE if "down" in name else HIDDEN,
            local=permutation(HIDDEN, seed=expert),
            kind=down if "down" in name else "input_permutation",
            seed=number + seed,
            dtype=dtype,
            kept=kept,
            group=2 * kept,
        )
    return made


def layer(
    value_dtype: str = "bfloat16", down: str = "folded", *, kept: int = 2, **options: Any
) -> Any:
    """The experts of a layer, as a model class of vLLM would build them."""
    listed = {"runtime_permuted": list(GATE_UP), "folded": []}
    listed["folded" if down == "folded" else "runtime_permuted"] += DOWN
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
    dtype = torch.float32 if value_dtype == "float32" else torch.bfloat16
    one_process = {"tp_size": 1, "dp_size": 1, "pcp_size": 1}
    runner = FusedMoEFactory(
        EXPERTS,
        CHOICES,
        params_dtype=dtype,
        quant_config=config(**listed, value_dtype=value_dtype, pattern=f"{kept}:{2 * kept}"),
        prefix=PREFIX,
        **(sizes | one_process | options),
    )
    return runner.routed_experts


def stored(found: Modules, prefix: str = PREFIX) -> Iterator[tuple[str, Tensor]]:
    """Names inside the layer and tensors, as the model loader hands them over."""
    for name, module in found.items():
        for kind, tensor in module.tensors.items():
            yield f"{name.removeprefix(f'{prefix}.')}.{kind}", tensor


def fill(experts: Any, tensors: Iterator[tuple[str, Tensor]]) -> None:
    list(experts.load_weights(tensors))
    experts.quant_method.process_weights_after_loading(experts)


def answer(experts: Any, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    experts._ensure_moe_quant_config_init()
    output: Tensor = experts.quant_method.apply(experts, x, weights, ids, None, None)
    return output


def expected(found: Modules, x: Tensor, weights: Tensor, ids: Tensor, part: slice) -> Tensor:
    """Loops over tokens and experts, in float64; `part` are the rows of gate and up that count."""
    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token].double(), ids[token], strict=True):
            gate, up, down = (found[f"{PREFIX}.{expert}.{leaf}"].dense.double() for leaf in LEAVES)
            gate, up, down = gate[part], up[part], down[:, part]
            y[token] += weight * (down @ (torch.nn.functional.silu(gate @ row) * (up @ row)))
    return y


def chosen(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOICES)
    return x, weights, ids.to(torch.int32)


def relative(y: Tensor, wanted: Tensor) -> float:
    return ((y.double() - wanted).norm() / wanted.norm()).item()


@pytest.mark.parametrize("down", ["folded", "input"])
def test_answers_as_loops_do(down: str) -> None:
    experts, found = layer(down=down), modules(down=f"{down}_permutation")
    fill(experts, stored(found))
    assert isinstance(experts.quant_method, PermLLMExpertsMethod)
    for tokens in (1, 5):
        x, weights, ids = chosen(tokens)
        y = answer(experts, x.bfloat16(), weights, ids)
        wanted = expected(found, x.bfloat16(), weights, ids, slice(None))
        assert relative(y, wanted) < 1e-2


@pytest.mark.parametrize("kept", [2, 8, 32])
def test_without_a_kernel_vllm_multiplies(kept: int) -> None:
    """Values of float32 in a model of float32 have none."""
    experts, found = layer("float32", kept=kept), modules(dtype=torch.float32, kept=kept)
    fill(experts, stored(found))
    assert experts.quant_method.dense is not None
    x, weights, ids = chosen(5)
    y = answer(experts, x, weights, ids)
    assert relative(y, expected(found, x, weights, ids, slice(None))) < 1e-5


def to_int8(found: Modules) -> Modules:
    """The same modules with values of int8, the largest of each row 127."""
    rounded = {}
    for name, module in found.items():
        scale = module.tensors["weight_packed"].float().abs().amax(1) / 127
        values = (module.tensors["weight_packed"].float() / scale[:, None]).round()
        tensors = module.tensors | {"weight_packed": values.to(torch.int8), "weight_scale": scale}
        dense = (module.dense.float() / scale[:, None]).round() * scale[:, None]
        rounded[name] = SparseModule(tensors, dense)
    return rounded


def to_int4(found: Modules) -> Modules:
    """Modules of the same shapes and permutations with int4 values."""
    made = {}
    for seed, (name, module) in enumerate(found.items()):
        (kind,) = [kind for kind in module.tensors if kind.endswith("permutation")]
        local = module.tensors[kind]
        made[name] = int4_module(*module.dense.shape, local=local, kind=kind, seed=seed)
    return made


ROUNDED = {"bfloat16": lambda found: found, "int8": to_int8, "int4": to_int4}


@pytest.mark.parametrize("values", list(ROUNDED))
@pytest.mark.parametrize("down", ["folded", "input"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_has_its_half_of_each_expert(
    rank: int, down: str, values: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: rank)
    found = ROUNDED[values](modules(down=f"{down}_permutation"))
    experts = layer(values, down=down, tp_size=2)
    fill(experts, stored(found))
    x, weights, ids = chosen(4)
    y = answer(experts, x.bfloat16(), weights, ids)
    half = INTERMEDIATE // 2
    part = slice(rank * half, rank * half + half)
    bound = 1e-2 if values == "bfloat16" else 3e-2
    assert relative(y, expected(found, x.bfloat16(), weights, ids, part)) < bound


def test_tensors_of_experts_of_another_rank_are_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one holds those from the second on."""
    experts, found = layer(), modules()
    monkeypatch.setattr(experts.expert_map_manager, "map_global_to_local", lambda one: one - 1)

    def anew() -> Any:
        experts.quant_method.create_weights(
            experts, EXPERTS - 1, HIDDEN, INTERMEDIATE, torch.bfloat16
        )
        return experts

    elsewhere = "0.up_proj.weight", torch.zeros(HIDDEN)
    fill(anew(), iter([*stored(found), elsewhere]))
    for kind in ("weight_mask", "weight"):
        parameter = getattr(anew(), f"w13_{kind}")
        given = {"shard_id": "w1", "expert_id": 0, "return_success": True}
        assert parameter.weight_loader(parameter, torch.zeros(1), "", **given)
    left = (entry for entry in stored(found) if entry[0] != "1.up_proj.weight_mask")
    with pytest.raises(CheckpointError, match=r"experts\.1\.up_proj\.weight_mask"):
        fill(anew(), left)


def test_a_dense_kernel_that_chooses_experts_itself_is_asked() -> None:
    experts, found = layer("float32"), modules(dtype=torch.float32)
    fill(experts, stored(found))
    asked: list[Any] = []
    experts.quant_method.dense = SimpleNamespace(
        apply_monolithic=lambda *arguments, **options: asked.append((arguments, options))
    )
    experts.quant_method.apply_monolithic(experts, x=1, router_logits=2)
    assert asked == [((experts,), {"x": 1, "router_logits": 2})]


def damaged(kind: str, change: Callable[[Tensor], Tensor], name: str = NAMES[4]) -> Modules:
    found = dict(modules())
    tensors = found[name].tensors
    found[name] = replace(found[name], tensors=tensors | {kind: change(tensors[kind].clone())})
    return found


def with_nan(tensor: Tensor) -> Tensor:
    tensor[3, 3] = float("nan")
    return tensor


DAMAGE: dict[str, tuple[Modules, str]] = {
    "shape": (damaged("weight_packed", lambda t: t[:, :-4]), r"1.up_proj.weight_packed is .* asks"),
    "dtype": (damaged("weight_packed", lambda t: t.to(torch.int8)), r"weight_packed is torch.int8"),
    "mask": (damaged("weight_mask", lambda t: t | 1), r"1.up_proj.weight_mask keeps 3 weights"),
    "numbers": (damaged("weight_packed", with_nan), r"1.up_proj.weight_packed.*inf or nan"),
    "others": (
        damaged("input_permutation", lambda t: t.flip(0)),
        r"1.up_proj.input_permutation differs from .*1.gate_proj",
    ),
    "doubled channels": (
        damaged("folded_permutation", lambda t: t.clamp(max=60), NAMES[5]),
        r"1.down_proj.folded_permutation is no permutation",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    found, message = DAMAGE[case]
    with pytest.raises(CheckpointError, match=message):
        fill(layer(), stored(found))


def test_a_missing_tensor_is_named() -> None:
    left = (entry for entry in stored(modules()) if entry[0] != "2.up_proj.weight_mask")
    with pytest.raises(CheckpointError, match=r"no .*experts\.2\.up_proj\.weight_mask, but"):
        fill(layer(), left)


def test_a_tensor_that_comes_twice_is_named() -> None:
    twice = (entry for entry in stored(modules()) for _ in range(2))
    with pytest.raises(CheckpointError, match=r"0\.gate_proj\.weight_packed was loaded twice"):
        fill(layer(), twice)


@pytest.mark.parametrize("kind", ["weight", "weight_scale", "bias"])
def test_what_must_not_be_there_is_named(kind: str) -> None:
    extra = f"1.down_proj.{kind}", torch.zeros(HIDDEN)
    with pytest.raises(CheckpointError, match=rf"1\.down_proj\.{kind} is in the checkpoint"):
        fill(layer(), iter([*stored(modules()), extra]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "gelu"}, "the activation gelu"),
        ({"has_bias": True}, "biases"),
        ({"swiglu_limit": 7.0}, "bounds of the activation"),
        ({"apply_router_weight_on_input": True}, "routing weights on the input"),
    ],
)
def test_other_experts_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"here there is {message}.*--ignore"):
        layer(**options)


@pytest.mark.parametrize("backend", ["allgather_reducescatter", "deepep_low_latency"])
def test_tokens_are_exchanged_in_one_way(backend: str) -> None:
    """Of engines in parallel, whose experts are spread over them."""
    experts = layer()
    parallel = replace(
        experts.moe_config.moe_parallel_config, dp_size=2, use_ep=True, all2all_backend=backend
    )
    experts.moe_config.moe_parallel_config = parallel
    assert parallel.use_all2all_kernels
    refused = backend != "allgather_reducescatter"
    expected = pytest.raises(
        NotImplementedError, match=f"here there is --all2all-backend {backend}"
    )
    with expected if refused else nullcontext():
        _require_supported(experts, PREFIX)


def test_adapters_are_refused(vllm_config: VllmConfig) -> None:
    vllm_config.lora_config = LoRAConfig()
    with pytest.raises(NotImplementedError, match=r"here there is LoRA \(--enable-lora\)"):
        layer()


@pytest.mark.parametrize("load_format", ["dummy", "sharded_state"])
def test_formats_without_a_checkpoint_are_refused(
    load_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    monkeypatch.setattr(weight_files, "get_current_vllm_config_or_none", lambda: current)
    with pytest.raises(CheckpointError, match=f"--load-format {load_format}"):
        layer()


def test_ranks_that_would_share_a_block_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 64 channels that are permuted at run time; one that is folded may be cut."""
    monkeypatch.setattr(moe_config, "get_tensor_model_parallel_rank", lambda: 0)
    layer(down="folded", intermediate_size=64, tp_size=2)
    with pytest.raises(ValueError, match=r"experts\.0\.down_proj: .* over 2 leaves 32 of its 64"):
        layer(down="input", intermediate_size=64, tp_size=2)


@pytest.mark.parametrize("value_dtype", ["bfloat16", "float32"])
def test_new_weights_take_the_place_of_the_first(value_dtype: str) -> None:
    """As vLLM loads them into a running model, with a kernel and without."""
    dtype = torch.float32 if value_dtype == "float32" else torch.bfloat16
    experts = layer(value_dtype)
    record_metadata_for_reloading(experts)
    fill(experts, stored(modules(dtype=dtype)))
    second = modules(dtype=dtype, seed=1000)
    initialize_layerwise_reload(experts)
    list(experts.load_weights(stored(second)))
    finalize_layerwise_reload(experts, SimpleNamespace(dtype=dtype))
    x, weights, ids = chosen(5)
    y = answer(experts, x.to(dtype), weights, ids)
    assert relative(y, expected(second, x.to(dtype), weights, ids, slice(None))) < 1e-2
