"""Generates tokens with a Llama, dense and sparse with the same weights, under CUDA graphs.

    python -m benchmarks.cuda.generation [--model DIRECTORY] [--json FILE]

The weights are those of a checkpoint of transformers, or random in Llama-2-7B's shapes. They are
pruned 2:4 by magnitude, in a random permutation where the layer reads a norm. Those of a sparse
checkpoint are taken as they are. The dense model multiplies the pruned weights too: both must say
the same, as far as bfloat16 allows, or the run fails. Both are in memory for the whole run: of
random weights there are only as many decoder layers as fit, and the result says how many. Needs
PyTorch, safetensors for `--model`, and pydantic where that is sparse.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.cuda.contestants import CUDA
from benchmarks.cuda.llama import Llama, RandomWeights, Shape, load
from benchmarks.cuda.memory import GIB, fitting
from benchmarks.cuda.pruned import Layers, both, is_sparse, prune_layers, read
from benchmarks.records.machine import revision, write_json
from benchmarks.records.result_file import new_result
from permllm_vllm.backends import fallback_reason

#: Of log-probabilities of the likeliest token, over a prompt that both models read alike. Noise of
#: half a unit in the last place in every linear layer of 32 random ones moves them by 0.10 at most;
#: the inputs of a single layer in a wrong order, by 1.5.
TOLERANCE = 0.25
DTYPE = torch.bfloat16
PROMPT = 32
"""Tokens that both models read."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a model said."""

    tokens: Tensor
    """int64 [sequences, tokens], the new ones."""
    log_probabilities: Tensor
    """float32 [length, sequences, vocabulary], over the prompt."""
    us: float
    """Median microseconds of a step."""


def generate(model: Llama, prompt: Tensor, tokens: int) -> Outcome:
    """Reads `prompt` [sequences, length] and adds `tokens`, each step a replay of one graph."""
    model.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.step()
    model.position.zero_()
    told = []
    for token in prompt.t():
        model.token.copy_(token)
        graph.replay()
        told.append(model.logits.float().log_softmax(dim=-1))
    added, times = [model.token.clone()], []
    for _ in range(tokens - 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
        added.append(model.token.clone())
    return Outcome(torch.stack(added, dim=1), torch.stack(told), statistics.median(times))


def compare(sequences: int, dense: Outcome, sparse: Outcome) -> dict[str, float]:
    """A row of the result: times, and how far the two models are from another."""
    likeliest = dense.log_probabilities.argmax(2, keepdim=True)
    difference = (dense.log_probabilities - sparse.log_probabilities).abs().gather(2, likeliest)
    return {
        "sequences": sequences,
        "dense_us_per_step": round(dense.us, 1),
        "sparse_us_per_step": round(sparse.us, 1),
        "speedup": round(dense.us / sparse.us, 3),
        "same_tokens": round(float((dense.tokens == sparse.tokens).float().mean()), 3),
        "largest_log_probability_difference": round(float(difference.max()), 4),
    }


def require_equal(rows: list[dict[str, float]]) -> None:
    """Fails where the models differ by more than rounding; NaN differs too."""
    far = [row for row in rows if not row["largest_log_probability_difference"] <= TOLERANCE]
    if far:
        raise SystemExit(
            f"log-probabilities of the sparse and the dense model differ by more than {TOLERANCE}: "
            f"{far}. The kernels are wrong here: run tests/cuda/test_gpu.py"
        )


def weights_of(
    directory: Path | None, sequences: int, length: int
) -> tuple[Shape, Mapping[str, Tensor], Layers]:
    """Sizes, weights and linear layers of a checkpoint, or random ones for this GPU's memory.

    Args:
        directory: of the checkpoint; None for random weights.
        sequences: most at a time.
        length: tokens of each.
    """
    if directory and is_sparse(directory):
        return read(directory, DTYPE, CUDA)
    weights: Mapping[str, Tensor]
    if directory:
        shape, weights = load(directory, DTYPE, CUDA)
    else:
        whole, (free, _) = Shape(), torch.cuda.mem_get_info(CUDA)
        shape = fitting(whole, free, sequences, PROMPT, length)
        if shape != whole:
            print(
                f"{shape.num_hidden_layers} of {whole.num_hidden_layers} decoder layers: no more "
                f"fit the {free / GIB:.1f} GiB of GPU memory that are free"
            )
        weights = RandomWeights(shape, DTYPE, CUDA)
    return shape, weights, prune_layers(shape, weights)


def main() -> None:
    """Generates with both models, compares, prints, writes JSON; fails where they differ."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda.generation", description=__doc__
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIRECTORY", help="of a Llama, dense or sparse"
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    with new_result(parser, arguments.json):
        _generate(arguments)


def _generate(arguments: argparse.Namespace) -> None:
    reason = fallback_reason(CUDA, DTYPE)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    torch.manual_seed(0)
    begun = revision()
    length = PROMPT + arguments.tokens + 1
    results = []
    with torch.inference_mode():
        shape, weights, layers = weights_of(arguments.model, max(arguments.sequences), length)
        models = both(layers)
        fixed = {
            name: weights[name]
            for name in (
                "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                *(f"model.layers.{i}.{norm}.weight" for i in range(shape.num_hidden_layers)
                  for norm in ("input_layernorm", "post_attention_layernorm")),
            )
        }  # fmt: skip
        for sequences in arguments.sequences:
            prompt = torch.randint(shape.vocab_size, (sequences, PROMPT), device=CUDA)
            outcomes = [
                generate(Llama(shape, fixed, linears, sequences, length), prompt, arguments.tokens)
                for linears in models
            ]
            results.append(compare(sequences, *outcomes))
            print(json.dumps(results[-1]))
    if arguments.json:
        name = str(arguments.model.name) if arguments.model else "random, Llama-2-7B's shapes"
        gpu = torch.cuda.get_device_name(CUDA)
        result = {
            "gpu": gpu,
            "model": name,
            "num_hidden_layers": shape.num_hidden_layers,
            "tolerance": TOLERANCE,
            "rows": results,
        }
        write_json(arguments.json, result, begun)
    require_equal(results)


if __name__ == "__main__":
    main()
