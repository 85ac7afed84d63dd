"""Which tensors of the checkpoint make up a vLLM layer, and which of them have arrived.

vLLM does not notice a tensor that is missing from a quantized checkpoint, or one that is there
twice: the parameter would keep uninitialized memory. So every tensor is checked and counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern

ShardId = str | int | tuple[int, ...] | None
"""How vLLM names a part of a fused layer: "q"/"k"/"v", an index, several, None for all of it."""

_QKV = {"q": 0, "k": 1, "v": 2}

NEEDED = (
    "the layer is not in the `ignore` list of its quantization_config, so it needs every tensor of "
    "the format"
)
"""Why a sparse layer cannot do without."""

CLASSIFIER = "score"
"""The layer that `--convert classify` adds to a language model."""

INCOMPLETE = "The checkpoint is incomplete: copy it again, or run `permllm-offline prune` again."
NO_CLASSIFIER = (
    "vLLM has this layer because of --convert classify, and the model no such head: leave the "
    "option out, or say which tokens are the answers (`classifier_from_token` in --hf-overrides)."
)


@dataclass(frozen=True)
class CheckpointLayer:
    """What the checkpoint holds for one vLLM linear layer, before tensor parallelism cuts it.

    `modules` are the names in the Hugging Face model, in vLLM's order; `output_sizes` the rows of
    each part of the fused layer. Usually there is one module per part; a layer that is fused on
    disk already has one module for all parts.
    """

    modules: Sequence[str]
    output_sizes: Sequence[int]
    input_size: int
    checkpoint: schema.QuantizationConfig

    def parts(self, shard_id: ShardId) -> tuple[int, ...]:
        """Indices of the parts that vLLM's shard id means."""
        if shard_id is None:
            return tuple(range(len(self.output_sizes)))
        if isinstance(shard_id, tuple):
            return shard_id
        return (_QKV[shard_id],) if isinstance(shard_id, str) else (shard_id,)

    def module(self, parts: Sequence[int]) -> str:
        """Name of the module that holds these parts, as well as it is known."""
        if len(self.modules) == 1:
            return self.modules[0]
        if len(self.modules) == len(self.output_sizes):
            return " + ".join(self.modules[part] for part in parts)
        return f"part {', '.join(map(str, parts))} of {' + '.join(self.modules)}"


@dataclass
class TensorSource:
    """The tensors of one kind (`weight_mask`, say) that fill one parameter, and those seen."""

    layer: CheckpointLayer
    kind: str
    loaded: set[int] = field(default_factory=set)

    def name(self, parts: Sequence[int]) -> str:
        """Name of the checkpoint tensor that holds these parts."""
        return f"{self.layer.module(parts)}.{self.kind}"

    def check(self, tensor: Tensor, parts: Sequence[int]) -> None:
        """Raise CheckpointError unless dtype and shape are those of the format."""
        layer = self.layer
        rows = sum(layer.output_sizes[part] for part in parts)
        pattern = Pattern.parse(layer.checkpoint.pattern)
        values = layer.checkpoint.value_dtype
        shape = schema.tensor_shape(self.kind, rows, layer.input_size, pattern, values)
        dtype = schema.tensor_dtype(self.kind, values)
        right_dtype = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
        if tuple(tensor.shape) != shape or not right_dtype:
            raise CheckpointError(
                f"{self.name(parts)} is {tensor.dtype} {list(tensor.shape)}, but the model's "
                f"configuration asks for {dtype or 'any floating dtype'} {list(shape)}. The "
                "checkpoint is damaged or belongs to another config.json: run `permllm-offline "
                "prune` again."
            )

    def count(self, parts: Sequence[int]) -> None:
        """Remember these parts; raises CheckpointError when one of them came before."""
        if self.loaded.intersection(parts):
            raise CheckpointError(
                f"{self.name(parts)} was loaded twice, but every tensor may be there once. Remove "
                "stale or duplicated .safetensors files from the checkpoint directory."
            )
        self.loaded.update(parts)

    def require_complete(self, rule: str = NEEDED) -> None:
        """Raise CheckpointError with the names of the tensors that never came, and the rule."""
        missing = [part for part in range(len(self.layer.output_sizes)) if part not in self.loaded]
        if missing:
            names = dict.fromkeys(self.name((part,)) for part in missing)
            remedy = NO_CLASSIFIER if self.layer.modules == [CLASSIFIER] else INCOMPLETE
            raise CheckpointError(f"the checkpoint has no {', '.join(names)}, but {rule}. {remedy}")
