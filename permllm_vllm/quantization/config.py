"""`quant_method: permllm` of a checkpoint's config.json, and which method each layer gets."""

import hashlib
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.compat import (
    LinearBase,
    QuantizationConfig,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    VocabParallelEmbedding,
    init_logger,
    register_quantization_config,
)
from permllm_vllm.quantization.dense import WEIGHT, DenseLinearMethod
from permllm_vllm.quantization.drafts import adapters_reach_model
from permllm_vllm.quantization.experts import PermLLMExpertsMethod
from permllm_vllm.quantization.head import head_method
from permllm_vllm.quantization.linear import PermLLMLinearMethod
from permllm_vllm.quantization.names import checkpoint_name, original_names
from permllm_vllm.quantization.served import ServedLayers, kernels
from permllm_vllm.quantization.unfolding import Unfolding
from permllm_vllm.quantization.weight_files import require_safetensors
from permllm_vllm.vllm_workarounds.write_order import KEPT

logger = init_logger("vllm.permllm.config")

TOLD_LATE = {"gate_up_proj": ["gate_proj", "up_proj"]}
"""Parts of fused layers that vLLM's Qwen3 MoE lists once its quantization has read the list.

A layer of that name in one part is one module of the checkpoint: Phi-3's in its Transformers class.
"""
STORED_WHOLE = {"glm4": frozenset({"gate_up_proj"})}
"""By `model_type`, fused layers that a checkpoint has as one module, though vLLM lists parts."""
IGNORED = "left dense (`ignore`)"
PERMUTED = "permuted at run time (`runtime_permuted`)"
FOLDED = "with a folded permutation (`folded`)"


@register_quantization_config(schema.QUANT_METHOD)
class PermLLMConfig(QuantizationConfig):
    """N:M sparse linear layers with a channel permutation, as `permllm-offline prune` writes them.

    `checkpoint` is None only where vLLM was asked for `--quantization permllm` on a checkpoint
    that does not say so itself; `maybe_update_config` then tells the user what to do.
    """

    def __init__(self, checkpoint: schema.QuantizationConfig | None = None) -> None:
        super().__init__()
        self._checkpoint = checkpoint
        self.served = ServedLayers()
        self._unfolding: Unfolding | None = None
        self._mappers: list[Any] = []
        self._stored_whole: frozenset[str] = frozenset()

    @property
    def checkpoint(self) -> schema.QuantizationConfig:
        """The checkpoint's own description of its sparse layers."""
        if self._checkpoint is None:
            raise CheckpointError(_dense_checkpoint_message("this model"))
        return self._checkpoint

    def __repr__(self) -> str:
        return f"PermLLMConfig({self._checkpoint!r})"

    @classmethod
    def get_name(cls) -> str:
        """Name of the method in config.json and on the command line."""
        return schema.QUANT_METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Activation dtypes; float32 with float32 values goes through the reference backend."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Sparse tensor cores came with compute capability 8.0; CPUs are not asked."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing but config.json describes the checkpoint."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "PermLLMConfig":
        """Read `quantization_config`; raises CheckpointError for unknown keys or versions."""
        return cls(schema.QuantizationConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Refuse what vLLM would take without asking, and look up what `ignore` leaves dense.

        A dense checkpoint with `--quantization permllm`; weights of a local directory that are not
        in whole safetensors files of its own. What a hub name stands for may not be there yet.
        Of a directory, names that regular expressions match are listed in full, so that they can
        follow any renaming.

        vLLM finds compiled graphs again by its configurations, that of the model among them. Which
        operands a layer has depends on the kernels and on what the checkpoint says of its layers,
        so both are written there; into the configuration of the text model too, by which alone
        vLLM knows the graphs of many a language model inside one of images.
        """
        if self._checkpoint is None:
            raise CheckpointError(_dense_checkpoint_message(model_name))
        if (directory := Path(model_name)).is_dir():
            names = [name.rpartition(".") for name in require_safetensors(directory)]
            dense = [module for module, _, kind in names if kind == WEIGHT]
            self._checkpoint = self._checkpoint.with_ignored(dense)
        if os.environ.get("VLLM_BATCH_INVARIANT", "0") != "0":
            logger.warning(
                "VLLM_BATCH_INVARIANT does not reach sparse layers: the kernel, and with it the "
                "rounding, depends on the number of tokens in a batch"
            )
        if hf_config is not None:
            for config in (hf_config, hf_config.get_text_config()):
                self._stored_whole |= STORED_WHOLE.get(config.model_type, frozenset())
            operands = f"{kernels()}, {KEPT}, checkpoint {_digest(self._checkpoint)}"
            for config in (hf_config, hf_config.get_text_config()):
                config.permllm_operands = operands

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename listed modules as vLLM's model class does.

        Regular expressions stay as they are: `_is_ignored` holds them against the names that
        modules had before, as far as it can tell.
        """

        self._mappers.append(hf_to_vllm_mapper)
        self._checkpoint = self.checkpoint.renamed(hf_to_vllm_mapper.apply_list)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Sparse method for a linear layer, the dense one where ignored; None is vLLM's own."""
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return head_method()
        if not isinstance(layer, LinearBase):
            return None
        modules = self._modules(layer, prefix)
        ignored = self._agreed(prefix, modules, self._is_ignored, IGNORED)
        permuted = self._agreed(
            prefix,
            modules,
            partial(self.checkpoint.lists, "runtime_permuted"),
            PERMUTED,
        )
        folded = self._agreed(
            prefix,
            modules,
            partial(self.checkpoint.lists, "folded"),
            FOLDED,
        )
        if self._unfolding is None and adapters_reach_model():
            self._refuse_smoothed()
            self._unfolding = Unfolding(self.checkpoint.block_size)
        if self._unfolding is not None:
            self._unfolding.add(prefix, layer, folded=folded, sparse=not ignored)
        if ignored:
            return DenseLinearMethod(self.checkpoint, prefix, modules)
        self._refuse_requantizing(layer, prefix)
        return PermLLMLinearMethod(
            self.checkpoint,
            self.served,
            prefix,
            modules,
            permuted=permuted,
            folded=folded,
            unfolding=self._unfolding,
        )

    def _refuse_smoothed(self) -> None:
        """Raise NotImplementedError where adapters of the dense model would read other numbers."""
        if self.checkpoint.smoothed:
            raise NotImplementedError(
                "LoRA was enabled, but this checkpoint is `smoothed`: its layers read inputs in "
                "other magnitudes than those of the dense model, which an adapter was trained on. "
                "Serve without --enable-lora, prune with `smoothing: false` in a recipe or convert "
                "with --no-smoothing, or merge the adapter into the dense model before pruning."
            )

    def _refuse_requantizing(self, layer: Any, prefix: str) -> None:
        """Raise NotImplementedError where vLLM is to quantize a sparse layer while it loads."""
        online = self.online_quantization_config
        if online is not None and online.resolve_quant_method_cls(type(layer), prefix) is not None:
            raise NotImplementedError(
                f"--quantization-config asks for {prefix} to be quantized, but it is sparse, and "
                "nothing multiplies it in another form. Leave the option out, or name dense layers "
                "alone in its `targets`; for int8 values, `permllm-offline convert --values int8`."
            )

    def _is_ignored(self, module: str) -> bool:
        """Whether `ignore` leaves a module dense, by vLLM's name or by the one it had before."""
        return any(map(self.checkpoint.is_ignored, original_names(module, self._mappers)))

    def _modules(self, layer: Any, prefix: str) -> list[str]:
        """Module names of the checkpoint that vLLM fused into the layer `prefix`."""
        name = checkpoint_name(prefix)
        parent, dot, leaf = name.rpartition(".")
        if leaf in self._stored_whole:
            return [name]
        late = TOLD_LATE.get(leaf, [leaf])
        if len(getattr(layer, "output_sizes", [leaf])) != len(late):
            late = [leaf]
        return [parent + dot + part for part in self.packed_modules_mapping.get(leaf) or late]

    @staticmethod
    def _agreed(prefix: str, modules: list[str], test: Callable[[str], bool], what: str) -> bool:
        """Whether `test` holds for the modules of a fused layer; all must agree."""
        chosen = [module for module in modules if test(module)]
        if chosen and len(chosen) < len(modules):
            others = [module for module in modules if module not in chosen]
            raise CheckpointError(
                f"vLLM serves {', '.join(modules)} as one layer ({prefix}), but the checkpoint has "
                f"{', '.join(chosen)} {what} and {', '.join(others)} not. Prune the model again "
                "with all of them treated alike."
            )
        return bool(chosen)

    def _experts_method(self, layer: Any, prefix: str) -> QuantizeMethodBase:
        """Sparse method for the experts of a layer, vLLM's dense one where ignored."""
        name = checkpoint_name(prefix)
        leaves = layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name
        modules = [
            tuple(f"{name}.{expert}.{leaf}" for leaf in leaves)
            for expert in range(layer.moe_config.num_logical_experts)
        ]
        every = [module for names in modules for module in names]
        if self._is_ignored(name) or self._agreed(prefix, every, self._is_ignored, IGNORED):
            return UnquantizedFusedMoEMethod(layer.moe_config)
        gate_up, down = [n for names in modules for n in names[:-1]], [n[-1] for n in modules]

        def agreed(key: Literal["runtime_permuted", "folded"], what: str) -> tuple[bool, bool]:
            test = partial(self.checkpoint.lists, key)
            return self._agreed(prefix, gate_up, test, what), self._agreed(prefix, down, test, what)

        return PermLLMExpertsMethod(
            layer,
            self.checkpoint,
            self.served,
            prefix,
            modules,
            permuted=agreed("runtime_permuted", PERMUTED),
            folded=agreed("folded", FOLDED),
        )


def _digest(checkpoint: schema.QuantizationConfig) -> str:
    """The same for descriptions that say the same, lists of modules and all."""
    return hashlib.sha256(json.dumps(checkpoint.to_dict(), sort_keys=True).encode()).hexdigest()


def _dense_checkpoint_message(model: str) -> str:
    return (
        f"{model} is not a PermLLM checkpoint: its config.json has no quantization_config with "
        "quant_method 'permllm'. Make one with `permllm-offline prune MODEL --output DIRECTORY` "
        "and serve that directory, or serve this model without --quantization permllm."
    )
