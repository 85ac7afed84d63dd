"""Every vLLM symbol that the plugin uses, and the vLLM versions it was tested with.

Nothing else but `plugin`, which must be able to say that this module failed, imports vLLM, so a
new vLLM release is checked here alone. A version outside the
tested range is worth a warning; only a symbol that is really missing is an error.
"""

import importlib
import logging
from typing import Any

from packaging.version import InvalidVersion, Version

from permllm_vllm.tested_versions import VLLM as TESTED_VERSIONS

SYMBOLS: list[tuple[str, str]] = []
"""(module, name) of everything looked up here, for checks against other vLLM releases."""


class IncompatibleVllmError(ImportError):
    """A symbol that the plugin needs does not exist in the installed vLLM."""


def installed_version() -> str:
    """Version of the installed vLLM, "unknown" where it does not say."""
    try:
        return str(importlib.import_module("vllm.version").__version__)
    except (ImportError, AttributeError):
        return "unknown"


def untested_version_warning(version: str) -> str | None:
    """What to tell the user about this vLLM version; None when it lies in the tested range."""
    try:
        tested = TESTED_VERSIONS.contains(Version(version), prereleases=True)
    except InvalidVersion:
        tested = False
    if tested:
        return None
    return (
        f"PermLLM is made for vLLM {TESTED_VERSIONS} and the installed vLLM is {version}: it "
        "may work. If it does not, install a tested vLLM or a newer permllm-vllm."
    )


def _symbol(module: str, name: str) -> Any:
    """`name` of vLLM's `module`; raises IncompatibleVllmError that says what to install."""
    SYMBOLS.append((module, name))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise IncompatibleVllmError(
            f"vLLM {installed_version()} has no {module}.{name}, which PermLLM needs ({error}). "
            f"Install vLLM {TESTED_VERSIONS}, or a permllm-vllm made for this vLLM."
        ) from error


init_logger = _symbol("vllm.logger", "init_logger")
get_current_vllm_config_or_none = _symbol("vllm.config", "get_current_vllm_config_or_none")

_QUANTIZATION = "vllm.model_executor.layers.quantization"
register_quantization_config = _symbol(_QUANTIZATION, "register_quantization_config")
QuantizationConfig = _symbol(f"{_QUANTIZATION}.base_config", "QuantizationConfig")
QuantizeMethodBase = _symbol(f"{_QUANTIZATION}.base_config", "QuantizeMethodBase")

_LINEAR = "vllm.model_executor.layers.linear"
LinearBase = _symbol(_LINEAR, "LinearBase")
LinearMethodBase = _symbol(_LINEAR, "LinearMethodBase")
QKVParallelLinear = _symbol(_LINEAR, "QKVParallelLinear")
UnquantizedLinearMethod = _symbol(_LINEAR, "UnquantizedLinearMethod")
register_weight_loader_v2_supported_method = _symbol(
    _LINEAR, "register_weight_loader_v2_supported_method"
)

_EMBEDDING = "vllm.model_executor.layers.vocab_parallel_embedding"
ParallelLMHead = _symbol(_EMBEDDING, "ParallelLMHead")
UnquantizedEmbeddingMethod = _symbol(_EMBEDDING, "UnquantizedEmbeddingMethod")
VocabParallelEmbedding = _symbol(_EMBEDDING, "VocabParallelEmbedding")

_MOE = "vllm.model_executor.layers.fused_moe"
FusedMoEMethodBase = _symbol(_MOE, "FusedMoEMethodBase")
RoutedExperts = _symbol(_MOE, "RoutedExperts")
UnquantizedFusedMoEMethod = _symbol(_MOE, "UnquantizedFusedMoEMethod")

_NORMS = "vllm.ir.ops"
rms_norm = _symbol(_NORMS, "rms_norm")
fused_add_rms_norm = _symbol(_NORMS, "fused_add_rms_norm")

_LOADER = "vllm.model_executor.model_loader"
MODEL_LOADERS = _symbol(_LOADER, "_LOAD_FORMAT_TO_MODEL_LOADER")
DefaultModelLoader = _symbol(_LOADER, "DefaultModelLoader")

_PARAMETER = "vllm.model_executor.parameter"
BasevLLMParameter = _symbol(_PARAMETER, "BasevLLMParameter")
ChannelQuantScaleParameter = _symbol(_PARAMETER, "ChannelQuantScaleParameter")
ModelWeightParameter = _symbol(_PARAMETER, "ModelWeightParameter")

if _warning := untested_version_warning(installed_version()):
    logging.getLogger("vllm.permllm").warning(_warning)
