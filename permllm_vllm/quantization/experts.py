"""The method of routed experts: loads their sparse tensors, packs them once, multiplies."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

import permllm_vllm.ops  # noqa: F401  (defines torch.ops.permllm)
from permllm_vllm.backends import CheckpointWeights, CpuBackend
from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.int4 import stored_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.compat import FusedMoEMethodBase, UnquantizedFusedMoEMethod
from permllm_vllm.quantization.contents import check_mask, check_numbers, shared_permutation
from permllm_vllm.quantization.drafts import adapters_reach_model
from permllm_vllm.quantization.expert_parameters import ExpertStack
from permllm_vllm.quantization.parameters import packed_tensor, register_packed
from permllm_vllm.quantization.partition import require_divisible
from permllm_vllm.quantization.served import ServedLayers
from permllm_vllm.quantization.sources import CheckpointLayer
from permllm_vllm.quantization.weight_files import refuse_load_format

_sparse_experts = torch.ops.permllm.sparse_experts.default

GATE_UP, DOWN = "w13", "w2"
"""vLLM's names of the two linear layers of an expert."""
ACTIVATION = "silu"
"""vLLM's name of what the operator does with a gate."""
OPERANDS = ("packed", "metadata", "permutation", "scale")
ALL_TO_ALL = "allgather_reducescatter"
"""vLLM's one backend of that option that asks nothing of the kernels."""


class PermLLMExpertsMethod(FusedMoEMethodBase):
    """N:M sparse weights of the experts of one layer.

    After loading, the layer keeps what was packed under the names `w13_packed`, `w13_metadata`,
    `w13_permutation`, `w13_scale` (None where there is nothing), and those of `w2`. Where no kernel
    multiplies experts, vLLM's own method multiplies the decompressed weights.

    `prefix` is vLLM's name of the layer; `modules` are those of gate, up and down of each expert in
    the checkpoint. `permuted` and `folded` say for gate and up, and for down, which permutation
    they have.
    """

    def __init__(
        self,
        layer: Any,
        checkpoint: schema.QuantizationConfig,
        served: ServedLayers,
        prefix: str,
        modules: Sequence[tuple[str, ...]],
        *,
        permuted: tuple[bool, bool],
        folded: tuple[bool, bool],
    ) -> None:
        super().__init__(layer.moe_config)
        _require_supported(layer, prefix)
        self.prefix = prefix
        self.checkpoint = checkpoint
        self.pattern = Pattern.parse(checkpoint.pattern)
        self.served = served
        self.modules = modules
        self.permuted = permuted
        self.folded = folded
        self.dense: Any = None

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """Nothing: vLLM's kernels see no sparse weight."""

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of the checkpoint format, cut to this rank.

        Raises:
            CheckpointError: vLLM is to read no checkpoint (`--load-format dummy`, and others).
        """
        refuse_load_format()
        ranks, inner = layer.moe_config.tp_size, intermediate_size_per_partition
        self.intermediate_size = inner
        down = [names[-1] for names in self.modules]
        blocks = self.checkpoint.block_size if self.permuted[1] else None
        require_divisible(down[:1], inner * ranks, inner, blocks, self.pattern)
        self.dtype = params_dtype
        self.stacks = (
            self._stack(layer, GATE_UP, (inner, inner), hidden_size),
            self._stack(layer, DOWN, (hidden_size,), inner),
        )
        for stack in self.stacks:
            stack.register(layer)
            for _ in stack.layers:
                self.served.created()

    def _stack(
        self, layer: Any, name: str, output_sizes: tuple[int, ...], columns: int
    ) -> ExpertStack:
        """One linear layer of the experts of this rank, by its rows and columns there."""
        moe, place = layer.moe_config, layer.expert_map_manager.map_global_to_local
        is_down = name == DOWN
        cut_rows, cut_columns = (1, moe.tp_size) if is_down else (moe.tp_size, 1)
        whole = [rows * cut_rows for rows in output_sizes], columns * cut_columns
        return ExpertStack(
            name=name,
            layers=tuple(
                CheckpointLayer(names[-1:] if is_down else names[:-1], *whole, self.checkpoint)
                for expert, names in enumerate(self.modules)
                if place(expert) >= 0
            ),
            output_sizes=output_sizes,
            columns=columns,
            rank=moe.tp_rank,
            permuted=self.permuted[is_down],
            folded=self.folded[is_down],
            local_expert=place,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, pack it for this device, and drop the checkpoint's tensors."""
        loaded = [stack for stack in self.stacks if self._pack(layer, stack)]
        if loaded and hasattr(layer, f"{DOWN}_weight"):
            self.dense = UnquantizedFusedMoEMethod(layer.moe_config)
            self.dense.process_weights_after_loading(layer)
            self.moe_kernel = self.dense.moe_kernel
            self.moe_quant_config = self.dense.moe_quant_config

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Sum of the chosen experts of each token: `x [tokens, hidden]` to the same."""
        if self.dense is not None:
            output: Tensor = self.dense.apply(
                layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input
            )
            return output
        if layer.expert_map is not None:  # of all experts: -1 for those of other ranks
            topk_ids = layer.expert_map[topk_ids.long()]
        operands = [
            packed_tensor(layer, f"{name}_{operand}")
            for name in (GATE_UP, DOWN)
            for operand in OPERANDS
        ]
        return _sparse_experts(
            x,
            topk_weights.float(),
            topk_ids.to(torch.int32),
            *operands,
            self.intermediate_size,
        )

    def apply_monolithic(self, layer: Any, *arguments: Any, **options: Any) -> Tensor:
        """The same where vLLM's kernel for dense experts chooses them itself, on some GPUs."""
        output: Tensor = self.dense.apply_monolithic(layer, *arguments, **options)
        return output

    def _pack(self, layer: Module, stack: ExpertStack) -> bool:
        """Put what serves in the place of what was loaded; False where it is there already."""
        loaded = stack.loaded(layer)
        if not loaded:
            return False
        device = loaded[schema.WEIGHT_PACKED].device
        values = schema.computed_dtype(self.checkpoint.value_dtype)
        backend = self.served.backend(device, self.dtype, values, experts=True)
        packed = [
            backend.pack(self._checked(stack, loaded, expert))
            for expert in range(len(stack.layers))
        ]
        stack.drop(layer)
        del loaded  # before the packed weights are copied into one piece
        if isinstance(backend, CpuBackend):
            stacked = backend.stack(packed)
            for operand in OPERANDS:
                register_packed(layer, f"{stack.name}_{operand}", getattr(stacked, operand))
        else:
            weight = torch.stack([one.packed for one in packed])
            register_packed(layer, f"{stack.name}_weight", weight)
        for one in packed:
            self.served.packed(backend, self.checkpoint, self.dtype, four_bits=one.four_bits)
        return True

    def _checked(
        self, stack: ExpertStack, loaded: Mapping[str, Any], expert: int
    ) -> CheckpointWeights:
        """The tensors of one expert; raises CheckpointError for contents that break a rule."""
        sources = {kind: parameter.sources[expert] for kind, parameter in loaded.items()}
        tensors = {kind: parameter.data[expert] for kind, parameter in loaded.items()}
        mask = tensors[schema.WEIGHT_MASK]
        check_mask(sources[schema.WEIGHT_MASK], mask, stack.output_sizes, self.pattern)
        numbers = [(sources[kind], tensor) for kind, tensor in tensors.items()]
        check_numbers(numbers, stack.output_sizes)
        permutation = None
        if (copies := tensors.get(schema.INPUT_PERMUTATION)) is not None:
            permutation = shared_permutation(sources[schema.INPUT_PERMUTATION], copies)
        return CheckpointWeights(
            values=stored_values(
                tensors[schema.WEIGHT_PACKED], tensors.get(schema.WEIGHT_MULTIPLIER)
            ),
            mask=mask,
            permutation=permutation,
            scale=tensors.get(schema.WEIGHT_SCALE),
            pattern=self.pattern,
            block_size=self.checkpoint.block_size,
        )


def _require_supported(layer: Any, prefix: str) -> None:
    """Raise NotImplementedError for experts that are computed in another way."""
    moe = layer.moe_config
    parallel = moe.moe_parallel_config
    found = {
        f"the activation {layer.activation.value}": layer.activation.value != ACTIVATION,
        "biases": moe.has_bias,
        "bounds of the activation": moe.swiglu_limit is not None,
        "routing weights on the input": layer.apply_router_weight_on_input,
        "LoRA (--enable-lora)": moe.is_lora_enabled and adapters_reach_model(),
        f"--all2all-backend {parallel.all2all_backend}": (
            parallel.use_all2all_kernels and parallel.all2all_backend != ALL_TO_ALL
        ),
    }
    present = [name for name, there in found.items() if there]
    if present:
        raise NotImplementedError(
            f"sparse experts ({prefix}) are served as silu(gate) * up of a token, then down, but "
            f"here there is {', '.join(present)}. Serve without, or prune the "
            r"model with its experts left dense: --ignore 're:.*\.experts\..*'."
        )
