"""vLLM's loader of weight files, held to fill every parameter of a PermLLM checkpoint's model.

vLLM asks for that in dense models alone: a sparse one would serve without a norm or an embedding,
with whatever was in memory.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import Module

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.compat import (
    MODEL_LOADERS,
    DefaultModelLoader,
    get_current_vllm_config_or_none,
)
from permllm_vllm.quantization.dense import DenseLinearMethod
from permllm_vllm.quantization.experts import PermLLMExpertsMethod
from permllm_vllm.quantization.head import adopt_heads
from permllm_vllm.quantization.linear import PermLLMLinearMethod
from permllm_vllm.quantization.names import original_names
from permllm_vllm.quantization.weight_files import require_safetensors
from permllm_vllm.vllm_workarounds.eager_helpers import keep_helpers_eager
from permllm_vllm.vllm_workarounds.norms import normalize_by_kernel
from permllm_vllm.vllm_workarounds.recurrent_drafts import refuse_drafts
from permllm_vllm.vllm_workarounds.write_order import keep_order

STREAMED: Any = MODEL_LOADERS.get("runai_streamer", DefaultModelLoader)
"""vLLM's loader from object stores, of versions that have one."""
_LOADED = "_permllm_loaded"
"""Attribute of a model: the names of the tensors that it was loaded from."""


class OnCpu:
    """Stands before a loader of vLLM's, and works around what vLLM and torch get wrong on CPUs.

    It acts before a model is built, since its classes may be compiled then. Models that are not
    sparse are loaded as by the loader alone.
    """

    def load_model(self, vllm_config: Any, model_config: Any, **options: Any) -> Module:
        """Build a model and load it."""
        sparse = model_config.quantization == schema.QUANT_METHOD
        on_cpu = sparse and vllm_config.device_config.device_type == "cpu"
        if on_cpu:
            eager = not vllm_config.compilation_config.mode
            keep_order()
            keep_helpers_eager(eager=eager)
            normalize_by_kernel(eager=eager)
        loader: Any = super()
        model: Module = loader.load_model(vllm_config, model_config, **options)
        if on_cpu:
            refuse_drafts(model, vllm_config)
        return model


class CompleteModelLoader(OnCpu, DefaultModelLoader):
    """vLLM's default loader; other models are loaded as by that.

    Raises CheckpointError with the names of parameters that nothing was loaded into, and of biases
    that have no place, unless vLLM's own option `enable_weights_track` says not to look.
    """

    def __init__(self, load_config: Any) -> None:
        super().__init__(load_config)
        self.enable_weights_track: bool | None
        self.is_sparse = False
        self.names: set[str] = set()

    def load_weights(self, model: Module, model_config: Any) -> None:
        """Load, let vLLM hand over what it loaded, and see to heads that it kept to itself."""
        self.is_sparse = model_config.quantization == schema.QUANT_METHOD
        self.names.clear()
        if self.is_sparse and self.enable_weights_track is None:
            self.enable_weights_track = True
        super().load_weights(model, model_config)
        if self.is_sparse:
            _adopt_heads(model, model_config)
            setattr(model, _LOADED, frozenset(self.names))

    def get_all_weights(self, model_config: Any, model: Module) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the checkpoint; their names are remembered.

        Into a model that is served already, vLLM loads what comes, and lets other tensors be those
        of before. So a directory is looked through at once, while the model is whole.
        """
        expected: frozenset[str] = getattr(model, _LOADED, frozenset())
        if expected and (directory := Path(model_config.model)).is_dir():
            _require_all(expected, require_safetensors(directory))
        return self._remembered(super().get_all_weights(model_config, model), expected)

    def _remembered(
        self, weights: Iterable[tuple[str, Tensor]], expected: frozenset[str]
    ) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in weights:
            self.names.add(name)
            yield name, tensor
        _require_all(expected, self.names)

    def track_weights_loading(
        self, model: Module, loaded_weights: set[str] | None, **options: Any
    ) -> None:
        """Hold a sparse model's parameters against the names of what was loaded, and of what is."""
        if not self.is_sparse:
            super().track_weights_loading(model, loaded_weights, **options)
            return
        missing: list[str] = []
        if loaded_weights is not None:
            missing += _unfilled(model, loaded_weights)
        if missing:
            raise CheckpointError(
                f"the checkpoint has no {', '.join(missing)}, but a model of its config.json needs "
                "all of its dense tensors too. The checkpoint is incomplete: copy it again, or run "
                "`permllm-offline prune` again."
            )
        if unexpected := list(_unexpected_biases(model, self.names)):
            raise CheckpointError(
                f"{', '.join(unexpected)} is in the checkpoint, but a model of its config.json has "
                "no such bias. config.json and the tensors do not belong together: copy the "
                "checkpoint again, or run `permllm-offline prune` again."
            )


class StreamingLoader(OnCpu, STREAMED):
    """vLLM's loader from object stores, which sees to heads too.

    It does not notice parameters that nothing was loaded into.
    """

    def load_weights(self, model: Module, model_config: Any) -> None:
        """Load, and see to heads that vLLM kept to itself."""
        is_sparse = model_config.quantization == schema.QUANT_METHOD
        super().load_weights(model, model_config)
        if is_sparse:
            _adopt_heads(model, model_config)


def install() -> None:
    """Take the place of vLLM's loaders of safetensors, for every format that they read."""
    ours = {STREAMED: StreamingLoader, DefaultModelLoader: CompleteModelLoader}
    for load_format, loader in MODEL_LOADERS.items():
        MODEL_LOADERS[load_format] = ours.get(loader, loader)


def _require_all(expected: frozenset[str], found: Iterable[str]) -> None:
    """Raise CheckpointError where new weights lack tensors that a model was loaded from."""
    if missing := sorted(expected.difference(found)):
        more = f", nor {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise CheckpointError(
            f"the new weights have no {missing[0]}{more}, which the model was loaded from, and it "
            "would keep those of before. Give a whole checkpoint of the same model."
        )


def _adopt_heads(model: Module, model_config: Any) -> None:
    config = get_current_vllm_config_or_none()
    in_stages = config is not None and config.parallel_config.pipeline_parallel_size > 1
    adopt_heads(model, generates=model_config.runner_type != "pooling" and not in_stages)


def _unfilled(model: Module, loaded: set[str]) -> Iterator[str]:
    """Names of the dense parameters that are none of `loaded`, under no name that they have.

    Sparse layers count their tensors themselves, by part. Online quantization makes parameters
    that no checkpoint holds.
    """
    every = model.named_parameters(remove_duplicate=False)  # tied weights have several names
    filled = {id(parameter) for name, parameter in every if name in loaded}
    for prefix, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        sparse = isinstance(method, PermLLMLinearMethod | PermLLMExpertsMethod)
        if sparse or getattr(method, "uses_meta_device", False):
            continue
        names = method.modules if isinstance(method, DenseLinearMethod) else [prefix]
        for kind, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in filled and parameter.numel():
                filled.add(id(parameter))
                yield from (f"{name}.{kind}" if name else kind for name in names)


def _unexpected_biases(model: Module, names: set[str]) -> Iterator[str]:
    """Those of `names` that are biases of sparse layers which have none; vLLM drops them."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    mappers = [] if mapper is None else [mapper.get_rename_mapper()]
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, PermLLMLinearMethod) and layer.bias is None:
            for module in method.modules:
                biases = [f"{name}.{schema.BIAS}" for name in original_names(module, mappers)]
                yield from (bias for bias in biases if bias in names)
