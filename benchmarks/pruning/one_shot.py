"""Quantizes a dense model by GPTQ with llm-compressor, whose Python runs this file alone.

    PYTHON one_shot.py MODEL OUTPUT --bits 4 --windows WINDOWS

Its requirements and those of vLLM do not meet, so it has an environment of its own, and what it
needs of this project comes as files: the model, and calibration windows as `torch.save` writes
them, int64 [windows, tokens].
"""

import argparse
from pathlib import Path

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
"""Input channels that share a scale of int4 and int3. Groups of 128, the usual ones, do not divide
the hidden size of SmolLM2-135M, 576."""


def scheme(bits: int) -> QuantizationScheme:
    """int8: a scale per output channel, and per token for the inputs; fewer bits: per group."""
    if bits == 8:
        inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, observer=None)
        weights = QuantizationArgs(num_bits=8, strategy="channel")
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    weights = QuantizationArgs(num_bits=bits, strategy="group", group_size=GROUP)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--bits", type=int, choices=[8, 4, 3], required=True)
    parser.add_argument("--windows", type=Path, required=True)
    options = parser.parse_args()
    windows = torch.load(options.windows, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    modifier = GPTQModifier(config_groups={"linear": scheme(options.bits)}, ignore=["lm_head"])
    rows = {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(rows),
        recipe=[modifier],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        batch_size=8,
    )
    model.save_pretrained(options.output, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.output)


if __name__ == "__main__":
    main()
