"""A dense checkpoint for llama.cpp: a GGUF file of its tensors, and what `llama-quantize` makes.

llama.cpp converts checkpoints itself, but only with tokenizers that it knows. Random models have
none, and to measure speed none is needed.
"""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from benchmarks.engines.twins import forget, is_twin, name_parent
from permllm_vllm.checkpoint.reader import CheckpointReader

FILE = "model.gguf"
DENSE = "BF16"
KINDS = (DENSE, "Q8_0", "Q4_0", "Q4_K_M")
"""Of values, as llama.cpp calls them: 16, 8.5, 4.5 and about 4.9 bits each."""


def gguf_twin(dense: Path, kind: str, quantize: Path) -> Path:
    """Return the folder with the GGUF twin of a dense checkpoint, made once, beside it.

    Args:
        dense: the checkpoint.
        kind: one of `KINDS`.
        quantize: llama.cpp's program `llama-quantize`.

    Raises:
        ValueError: llama.cpp's `llama` is not what the checkpoint is.
        RuntimeError: the program failed; the message is its last line.
    """
    output = dense.with_name(f"{dense.name}-gguf-{kind.lower()}")
    if is_twin(output, dense):
        return output
    source = None if kind == DENSE else gguf_twin(dense, DENSE, quantize)
    forget(output)
    output.mkdir()
    if source is None:
        write_gguf(dense, output / FILE)
    else:
        command = [str(quantize), str(source / FILE), str(output / FILE), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = (done.stderr + done.stdout).strip().rpartition("\n")[2]
            raise RuntimeError(f"{quantize.name} ended with status {done.returncode}: {said}")
    shutil.copy(dense / "config.json", output)  # by which it is told from others
    name_parent(output, dense)
    return output


def write_gguf(dense: Path, file: Path) -> None:
    """Write a checkpoint of the family llama into one file, a tensor in memory at a time.

    Matrices are bfloat16, the rest float32, which is what llama.cpp computes with.

    Raises:
        ValueError: it is of another family, or its rotary embedding is scaled.
    """
    config = AutoConfig.from_pretrained(dense)
    rotary = config.rope_parameters if config.model_type == "llama" else {}
    if rotary.get("rope_type") != "default":
        raise ValueError(
            f"{dense.name}: llama.cpp is compared with models of the family llama whose rotary "
            f"embedding is not scaled, and this is {config.model_type} {rotary or ''}".rstrip()
        )
    reader = CheckpointReader(dense)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, config, rotary["rope_theta"])
    ordered = _ordered(config)
    for name in reader.names():
        tensor = _stored(reader.tensor(name))
        writer.add_tensor_info(
            names.get_name(name, try_suffixes=(".weight", ".bias")) or name,
            tensor.shape,
            tensor.numpy().dtype,
            tensor.nbytes,
            gguf.GGMLQuantizationType.BF16 if tensor.dim() > 1 else None,
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in reader.names():
        writer.write_tensor_data(_stored(ordered(name, reader.tensor(name))).numpy())
    writer.close()


def pairs_together(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order of llama.cpp.

    Its rotary embedding turns neighbours of a head; that of transformers a channel of the first
    half and the same one of the second.

    Args:
        weight: [heads * channels, ...].
        heads: how many.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _describe(writer: gguf.GGUFWriter, config: PretrainedConfig, rope_theta: float) -> None:
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _ordered(config: PretrainedConfig) -> Callable[[str, Tensor], Tensor]:
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}

    def ordered(name: str, tensor: Tensor) -> Tensor:
        module = name.split(".")[-2]
        return pairs_together(tensor, heads[module]) if module in heads else tensor

    return ordered


def _stored(tensor: Tensor) -> Tensor:
    """As the file has it: NumPy has no bfloat16, so its bits, and GGUF's library wants bytes."""
    if tensor.dim() == 1:
        return tensor.float().contiguous()
    return tensor.to(torch.bfloat16).contiguous().view(torch.uint8)
