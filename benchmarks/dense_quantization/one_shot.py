"""Quantizes a dense model by GPTQ with llm-compressor, whose Python runs this file alone.

    PYTHON compress.py MODEL OUTPUT --values int4 --group 64 --windows WINDOWS

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


def scheme(values: str, group: int | None) -> QuantizationScheme:
    """int8: a scale per output channel, and per token for the inputs; int4: one per group."""
    if values == "int8":
        inputs = QuantizationArgs(num_bits=8, strategy="token", dynamic=True, observer=None)
        weights = QuantizationArgs(num_bits=8, strategy="channel")
        return QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--values", choices=["int8", "int4"], required=True)
    parser.add_argument("--group", type=int, help="input channels of a scale of int4")
    parser.add_argument("--windows", type=Path, required=True)
    options = parser.parse_args()
    windows = torch.load(options.windows, weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    modifier = GPTQModifier(
        config_groups={"linear": scheme(options.values, options.group)}, ignore=["lm_head"]
    )
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
