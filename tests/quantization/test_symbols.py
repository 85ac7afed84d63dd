"""Everything that the plugin uses of vLLM exists, in the installed vLLM and in other releases.

`PERMLLM_VLLM_SOURCES=PATH` names a wheel, or a directory with the package `vllm`, to check too;
`pip download --no-deps vllm` gets the newest wheel.
"""

import ast
import inspect
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.version import Version

from benchmarks.packages import cache_dir
from permllm_vllm import compat
from permllm_vllm.quantization.config import PermLLMConfig
from permllm_vllm.quantization.dense import DenseLinearMethod
from permllm_vllm.quantization.experts import PermLLMExpertsMethod
from permllm_vllm.quantization.linear import PermLLMLinearMethod
from permllm_vllm.quantization.model_loader import CompleteModelLoader
from tests.quantization.vllm_sources import VllmSources

BASE_CONFIG = "vllm.model_executor.layers.quantization.base_config"
LINEAR = "vllm.model_executor.layers.linear"
EXPERTS_METHOD = "vllm.model_executor.layers.fused_moe.fused_moe_method_base"
LOADER = "vllm.model_executor.model_loader.default_loader"
BASE_LOADER = "vllm.model_executor.model_loader.base_loader"
MAPPER = "vllm.model_executor.models.utils"
MOE = "vllm.model_executor.layers.fused_moe"
PARAMETER = "vllm.model_executor.parameter"
LAYERS = [
    "ReplicatedLinear",
    "ColumnParallelLinear",
    "MergedColumnParallelLinear",
    "QKVParallelLinear",
    "RowParallelLinear",
]
#: What vLLM calls, by the class that says how.
OVERRIDDEN = [
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "get_name"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "get_supported_act_dtypes"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "get_min_capability"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "get_config_filenames"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "from_config"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "get_quant_method"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "apply_vllm_mapper"),
    (PermLLMConfig, BASE_CONFIG, "QuantizationConfig", "maybe_update_config"),
    (PermLLMLinearMethod, LINEAR, "LinearMethodBase", "create_weights"),
    (DenseLinearMethod, LINEAR, "UnquantizedLinearMethod", "create_weights"),
    (DenseLinearMethod, LINEAR, "UnquantizedLinearMethod", "process_weights_after_loading"),
    (CompleteModelLoader, BASE_LOADER, "BaseModelLoader", "load_model"),
    (CompleteModelLoader, LOADER, "DefaultModelLoader", "load_weights"),
    (CompleteModelLoader, LOADER, "DefaultModelLoader", "get_all_weights"),
    (CompleteModelLoader, LOADER, "DefaultModelLoader", "track_weights_loading"),
    (PermLLMLinearMethod, LINEAR, "LinearMethodBase", "apply"),
    (PermLLMLinearMethod, BASE_CONFIG, "QuantizeMethodBase", "process_weights_after_loading"),
    (PermLLMExpertsMethod, EXPERTS_METHOD, "FusedMoEMethodBase", "create_weights"),
    (PermLLMExpertsMethod, EXPERTS_METHOD, "FusedMoEMethodBase", "get_fused_moe_quant_config"),
    (PermLLMExpertsMethod, EXPERTS_METHOD, "FusedMoEMethodBase", "apply"),
]
OF_EXPERTS = (
    *("moe_config", "expert_map_manager", "expert_map", "activation", "weight_loader"),
    *("ckpt_gate_proj_name", "ckpt_up_proj_name", "ckpt_down_proj_name"),
    *("apply_router_weight_on_input", "load_weights"),
)
OF_THEIR_CONFIG = (
    *("num_logical_experts", "tp_size", "tp_rank"),
    *("has_bias", "swiglu_limit", "is_lora_enabled"),
)
#: What we read off vLLM's objects, or put there for vLLM to read.
ATTRIBUTES = [
    (BASE_CONFIG, "QuantizationConfig", "packed_modules_mapping"),
    (BASE_CONFIG, "QuantizationConfig", "online_quantization_config"),
    ("vllm.config", "VllmConfig", "lora_config"),
    ("vllm.config", "VllmConfig", "speculative_config"),
    ("vllm.config", "VllmConfig", "model_config"),
    ("vllm.config", "VllmConfig", "parallel_config"),
    ("vllm.config", "VllmConfig", "compilation_config"),
    ("vllm.config", "VllmConfig", "device_config"),
    ("vllm.config", "DeviceConfig", "device_type"),
    ("vllm.config", "ModelConfig", "hf_config"),
    ("vllm.config", "SpeculativeConfig", "draft_model_config"),
    ("vllm.config", "SpeculativeConfig", "target_model_config"),
    ("vllm.config", "CompilationConfig", "mode"),
    ("vllm.config", "ModelConfig", "model"),
    ("vllm.config", "ParallelConfig", "pipeline_parallel_size"),
    ("vllm.config", "ModelConfig", "runner_type"),
    (LOADER, "DefaultModelLoader", "enable_weights_track"),
    ("vllm.config", "ModelConfig", "quantization"),
    (BASE_CONFIG, "QuantizeMethodBase", "uses_meta_device"),
    (LINEAR, "LinearBase", "quant_method"),
    (LINEAR, "QKVParallelLinear", "num_kv_heads"),
    (LINEAR, "QKVParallelLinear", "num_kv_head_replicas"),
    (LINEAR, "QKVParallelLinear", "v_head_size"),
    *((LINEAR, layer, "weight_loader") for layer in LAYERS),
    *((LINEAR, layer, "bias") for layer in LAYERS),
    *((MAPPER, "WeightsMapper", f"orig_to_new_{part}") for part in ("prefix", "suffix", "substr")),
    *((MOE, "RoutedExperts", attribute) for attribute in OF_EXPERTS),
    *((f"{MOE}.config", "FusedMoEConfig", field) for field in OF_THEIR_CONFIG),
    ("vllm.config", "ModelConfig", "dtype"),
    (f"{MOE}.expert_map_manager", "ExpertMapManager", "map_global_to_local"),
    ("vllm.model_executor.models.interfaces", "SupportsQuant", "hf_to_vllm_mapper"),
    (PARAMETER, "BasevLLMParameter", "tp_rank"),
    (PARAMETER, "ModelWeightParameter", "input_dim"),
    (PARAMETER, "ModelWeightParameter", "output_dim"),
    (PARAMETER, "ChannelQuantScaleParameter", "output_dim"),
]
#: What else than None and indices vLLM calls the parts of a fused layer.
SHARD_IDS = [("QKVParallelLinear", {"q", "k", "v"})]
PACKAGE = Path(compat.__file__).parent
#: The second looks vLLM up by itself when the first cannot be imported.
MAY_IMPORT_VLLM = {"compat.py", "plugin.py"}


def installed() -> Path:
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def others() -> list[Path]:
    named = os.environ.get("PERMLLM_VLLM_SOURCES")
    wheels = sorted((cache_dir() / "wheels").glob("vllm-*.whl"), key=wheel_version)
    return [*([Path(named)] if named else []), *wheels[-1:]]


def wheel_version(wheel: Path) -> Version:
    return Version(wheel.name.split("-")[1])


@pytest.fixture(params=["installed", "other"], scope="module")
def sources(request: pytest.FixtureRequest) -> VllmSources:
    if request.param == "installed":
        return VllmSources(installed())
    if not others():
        pytest.skip("no other vLLM: PERMLLM_VLLM_SOURCES is not set, and no wheel is in the cache")
    return VllmSources(others()[0])


def test_symbols(sources: VllmSources) -> None:
    assert len(compat.SYMBOLS) > 10
    missing = [f"{m}.{name}" for m, name in compat.SYMBOLS if not sources.defines(m, name)]
    assert not missing


def vllm_imports(source: str) -> list[int]:
    """Lines that import vLLM, or by a computed name what may be vLLM."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (name,) = node.args
            names = [name.value if isinstance(name, ast.Constant) else "vllm"]
        else:
            continue
        lines += [node.lineno for name in names if name.split(".")[0] == "vllm"]
    return lines


def test_all_symbols_are_looked_up_in_one_module() -> None:
    importers = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if vllm_imports(path.read_text(encoding="utf-8"))
    }
    assert importers == MAY_IMPORT_VLLM


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import vllm", True),
        ("import os, vllm.config as config", True),
        ("def f():\n    from vllm.config import VllmConfig", True),
        ("importlib.import_module('vllm.config')", True),
        ("import_module(module)", True),
        ("import_module('torch')", False),
        ("from permllm_vllm import compat", False),
        ("from permllm_vllm.diagnosis.serving import vllm", False),
        ("init_logger('vllm.permllm')", False),
    ],
)
def test_what_imports_vllm(line: str, found: bool) -> None:
    assert bool(vllm_imports(line)) is found


@pytest.mark.parametrize(("ours", "module", "base", "function"), OVERRIDDEN)
def test_functions_that_vllm_calls(
    sources: VllmSources, ours: type, module: str, base: str, function: str
) -> None:
    """They exist there, and every argument that vLLM could give by name is one of ours."""
    functions = sources.functions(module, base)
    assert function in functions
    accepted = inspect.signature(getattr(ours, function)).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        assert set(functions[function]) - {"self", "cls"} <= set(accepted)


@pytest.mark.parametrize(("module", "class_name", "attribute"), ATTRIBUTES)
def test_attributes(sources: VllmSources, module: str, class_name: str, attribute: str) -> None:
    assert attribute in sources.attributes(module, class_name)


@pytest.mark.parametrize(("class_name", "names"), SHARD_IDS)
def test_parts_of_fused_layers(sources: VllmSources, class_name: str, names: set[str]) -> None:
    assert names <= sources.constants(LINEAR, class_name)


def test_the_version(sources: VllmSources) -> None:
    assert sources.defines("vllm.version", "__version__")


def test_the_newest_wheel_is_the_one_of_the_highest_version() -> None:
    names = ["vllm-0.9.2-cp38-abi3-linux_x86_64.whl", "vllm-0.33.0-cp38-abi3-linux_x86_64.whl"]
    newest = max(map(Path, names), key=wheel_version)
    assert newest.name == names[1]


def test_names_are_mapped_with(sources: VllmSources) -> None:
    assert {"apply_list", "get_rename_mapper"} <= sources.functions(MAPPER, "WeightsMapper").keys()


def test_what_is_not_there(sources: VllmSources) -> None:
    assert not sources.defines(LINEAR, "NoSuchLinear")
    assert not sources.defines("vllm.no_such_module", "LinearBase")
    assert sources.functions(LINEAR, "NoSuchLinear") == {}
    assert sources.attributes(LINEAR, "NoSuchLinear") == set()
    assert "no_such_attribute" not in sources.attributes(LINEAR, "QKVParallelLinear")
    assert "qkv" not in sources.constants(LINEAR, "QKVParallelLinear")
