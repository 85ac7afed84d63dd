"""What Transformers calls while it loads a checkpoint: replace linears, check, dequantize."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer, register_quantizer

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem, raise_if_any
from permllm_vllm.checkpoint.headers import TensorHeader, checkpoint_problems, sparse_modules
from permllm_vllm.checkpoint.shards import read_headers
from permllm_vllm.hf.config import PermLLMConfig
from permllm_vllm.hf.experts import FUSED, fused_experts, merges, separate_experts
from permllm_vllm.hf.linear import Backends, SparseLinear
from permllm_vllm.hf.missing import missing_parameters
from permllm_vllm.hf.precision import kept_in_float32


@register_quantizer(schema.QUANT_METHOD)
class PermLLMQuantizer(HfQuantizer):
    """Loads checkpoints of this format into any model class whose linears are `nn.Linear`."""

    requires_calibration = True
    quantization_config: PermLLMConfig

    @property
    def checkpoint(self) -> schema.QuantizationConfig:
        """The checkpoint's description of its sparse layers."""
        return self.quantization_config.checkpoint

    @property
    def is_trainable(self) -> bool:
        """Kept values have no gradient."""
        return False

    def is_serializable(self) -> bool:
        """`save_pretrained` writes the format back."""
        return True

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        """Check names, shapes and dtypes of the whole checkpoint, then put sparse layers in place.

        Raises:
            CheckpointError: a tensor is missing, doubled, or of another shape or dtype.
        """
        self._dtype = torch.get_default_dtype()  # Transformers sets it to the model's
        headers = _stored_headers(checkpoint_files)
        raise_if_any(checkpoint_problems(headers, self.checkpoint))
        sparse, backends = set(sparse_modules(headers)), Backends()
        stored, prefix = _stored_names(model, sparse), getattr(model, "base_model_prefix", "")
        self._separate = _separate_sparse_experts(model, stored)
        problems: list[Problem] = []
        for path, linear in list(_linears(model)):
            # A bare `AutoModel` lacks the prefix that its modules have in a checkpoint.
            name = stored.get(f"{prefix}.{path}") or stored.get(path)
            if name is None:
                continue
            sparse.remove(name)
            problems += _size_problems(name, linear, headers)
            layer = SparseLinear(
                linear.in_features,
                linear.out_features,
                bias=linear.bias is not None,
                checkpoint=self.checkpoint,
                name=name,
                backends=backends,
                dtype=self._dtype,
                device=linear.weight.device,
            )
            model.set_submodule(path, layer)
        problems += missing_parameters(model, headers.keys())
        problems += [
            Problem(
                f"{name}.{schema.WEIGHT_PACKED}",
                "a sparse layer",
                f"{type(model).__name__} has a linear layer of this name",
                "config.json belongs to another checkpoint: fetch or write this one again",
            )
            for name in sorted(sparse)
        ]
        raise_if_any(problems)
        return model

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: nn.Module | None = None
    ) -> list[Any]:
        """Leave out what would merge the tensors of experts that are separate here.

        Transformers hands over the model from 5.22 on.
        """
        merged = [f"{path}.{kind}" for path in self._separate for kind in FUSED]
        return [one for one in weight_conversions if not any(merges(one, name) for name in merged)]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Check the contents of what is in memory; what waits on disk is checked when it comes.

        Transformers leaves tensors whose names it had to change, such as those of experts and all
        of a bare `AutoModel`, in the checkpoint's dtype: they get the one that was asked for.
        """
        for path, module in model.named_modules():
            if isinstance(module, SparseLinear) and path == module.name:
                continue
            for kind, parameter in module.named_parameters(recurse=False):
                if not kept_in_float32(model, f"{path}.{kind}", self._dtype):
                    parameter.data = parameter.data.to(self._dtype)
        raise_if_any([p for _, layer in _sparse_layers(model) for p in layer.content_problems()])
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        """Put dense layers in place of sparse ones; rows that a fold moved stay moved."""
        for path, layer in list(_sparse_layers(model)):
            model.set_submodule(path, layer.dense(dtype or torch.get_default_dtype()))
        return model


def _separate_sparse_experts(model: nn.Module, sparse: Collection[str]) -> list[str]:
    """Give experts modules of their own where any is sparse; the paths of these come back."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    holding = {name.rpartition(".")[0].rpartition(".")[0] for name in sparse}
    if not any({path, prefix + path} & holding for path in fused_experts(model)):
        return []
    return separate_experts(model)


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear))


def _sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    return ((path, m) for path, m in model.named_modules() if isinstance(m, SparseLinear))


def _stored_headers(checkpoint_files: Sequence[str] | None) -> dict[str, TensorHeader]:
    """Read the headers of all files; raises CheckpointError where a name comes twice."""
    if not checkpoint_files:
        rule = "the tensors come from the checkpoint's own safetensors files"
        remedy = "give from_pretrained the directory of the checkpoint, and no state_dict"
        raise Problem("state_dict", "no checkpoint files", rule, remedy).as_error()
    headers: dict[str, TensorHeader] = {}
    for file in checkpoint_files:
        found = read_headers(Path(file))
        for name in sorted(headers.keys() & found.keys()):
            rule = "every tensor is in exactly one file"
            raise Problem(name, f"a second tensor in {file}", rule, FETCH_AGAIN).as_error()
        headers.update(found)
    return headers


def _stored_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Names of modules in the checkpoint by those that Transformers changes them to."""
    tensor = f".{schema.WEIGHT_PACKED}"
    changes = [
        change
        for change in get_model_conversion_mapping(model)
        if not isinstance(change, WeightConverter)
    ]
    found = {}
    for stored in names:
        name = stored + tensor
        for change in changes:
            name, _ = change.rename_source_key(name)
        found[name.removesuffix(tensor)] = stored
    return found


def _size_problems(
    name: str, linear: nn.Linear, headers: Mapping[str, TensorHeader]
) -> list[Problem]:
    """Compare a stored layer with the model's configuration: Transformers would not."""
    rows, mask_bytes = headers[f"{name}.{schema.WEIGHT_MASK}"].shape
    remedy = "config.json belongs to another checkpoint: fetch or write this one again"
    problems = []
    if (rows, mask_bytes * 8) != (linear.out_features, linear.in_features):
        rule = f"the configuration makes it {linear.out_features} x {linear.in_features}"
        value = f"a layer of {rows} x {mask_bytes * 8}"
        problems.append(Problem(f"{name}.{schema.WEIGHT_MASK}", value, rule, remedy))
    stored_bias = f"{name}.{schema.BIAS}" in headers
    if stored_bias != (linear.bias is not None):
        value, word = ("a bias", "without") if stored_bias else ("nothing", "with")
        rule = f"the configuration makes this a layer {word} a bias"
        problems.append(Problem(f"{name}.{schema.BIAS}", value, rule, remedy))
    return problems
