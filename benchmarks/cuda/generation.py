"""Generates tokens with a Llama, dense and sparse with the same weights, under CUDA graphs.

    python -m benchmarks.cuda.generation [--model DIRECTORY] [--json FILE]

The weights are those of a checkpoint of transformers, or random in Llama-2-7B's shapes. They are
pruned 2:4 by magnitude, in a random permutation where the layer reads a norm. Those of a sparse
checkpoint are taken as they are. The dense model multiplies the pruned weights too: both must say
the same, as far as bfloat16 allows, or the run fails. Needs PyTorch, safetensors for `--model`, and
pydantic where that is sparse.
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
from benchmarks.cuda.pruned import dense_linear, is_sparse, prune_layers, read, sparse_linear
from benchmarks.records.machine import write_json
from permllm_vllm.backends import fallback_reason

#: Of log-probabilities of the likeliest token, over a prompt that both models read alike. Noise of
#: half a unit in the last place in every linear layer of 32 random ones moves them by 0.10 at most;
#: the inputs of a single layer in a wrong order, by 1.5.
TOLERANCE = 0.25


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
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    dtype = torch.bfloat16
    reason = fallback_reason(CUDA, dtype)
    if reason:
        raise SystemExit(f"the CUDA kernels do not run here: {reason}")
    torch.manual_seed(0)
    shape = Shape()
    weights: Mapping[str, Tensor] = RandomWeights(shape, dtype, CUDA)
    results = []
    with torch.inference_mode():
        if arguments.model and is_sparse(arguments.model):
            shape, weights, layers = read(arguments.model, dtype, CUDA)
        else:
            if arguments.model:
                shape, weights = load(arguments.model, dtype, CUDA)
            layers = prune_layers(shape, weights)
        fixed = {
            name: weights[name]
            for name in (
                "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                *(f"model.layers.{i}.{norm}.weight" for i in range(shape.num_hidden_layers)
                  for norm in ("input_layernorm", "post_attention_layernorm")),
            )
        }  # fmt: skip
        for sequences in arguments.sequences:
            prompt = torch.randint(shape.vocab_size, (sequences, 32), device=CUDA)
            outcomes = []
            for linear in (dense_linear, sparse_linear):
                linears = [{n: linear(layer) for n, layer in each.items()} for each in layers]
                model = Llama(shape, fixed, linears, sequences, 32 + arguments.tokens + 1)
                outcomes.append(generate(model, prompt, arguments.tokens))
                del model, linears
            results.append(compare(sequences, *outcomes))
            print(json.dumps(results[-1]))
    if arguments.json:
        name = str(arguments.model.name) if arguments.model else "random, Llama-2-7B's shapes"
        gpu = torch.cuda.get_device_name(CUDA)
        write_json(
            arguments.json, {"gpu": gpu, "model": name, "tolerance": TOLERANCE, "rows": results}
        )
    require_equal(results)


if __name__ == "__main__":
    main()
