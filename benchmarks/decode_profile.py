"""Where the time of a decoded token goes: the linear layers, the head, attention, and the rest.

One engine in this process, eager, one sequence; the profiler sees calls of operators, so what
happens inside a sparse linear layer is one number, and what the plugin adds around it another.

    python -m benchmarks.decode_profile --json OUT
    python -m benchmarks.decode_profile --model llama-3.2-1b --json OUT
"""

import argparse
import cProfile
import os
import pstats
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from .engines.engine import ENGINE_OPTIONS, ENVIRONMENT
from .engines.kv_cache import kv_cache_environment
from .models import LLAMA_SHAPES, random_llama
from .pruning.commands import magnitude_pruned
from .records.machine import write_json

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 65
PARTS: Mapping[str, tuple[str, ...]] = {
    "sparse linear": ("permllm.sparse_linear",),
    "dense linear, the head included": ("onednn_mm", "torch._C._nn.linear", "_C.onednn_scaled_mm"),
    "attention and KV cache": ("cpu_attention_with_kv_cache", "cpu_attn_reshape_and_cache"),
    "rotary embedding": ("rotary_embedding",),
}
"""Operators, by a part of the profiler's name for them."""
PLUGIN = "permllm_vllm"


def profile(model: Path) -> dict[str, float]:
    """Milliseconds of one decoded token by part; the sum is that of the whole step.

    An engine in this process has the threads of this process: vLLM reserves no core then.
    """
    os.environ.update(ENVIRONMENT | kv_cache_environment(), VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from vllm import LLM, SamplingParams, TokensPrompt

    engine = LLM(model=str(model), enforce_eager=True, **ENGINE_OPTIONS)
    prompt = TokensPrompt(prompt_token_ids=[3 + 13 * j for j in range(PROMPT_TOKENS)])

    def answer(tokens: int) -> Mapping[str, float]:
        sampling = SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        profiler = cProfile.Profile()
        profiler.runcall(engine.generate, [prompt], sampling, use_tqdm=False)
        return seconds_by_part(pstats.Stats(profiler))

    answer(OUTPUT_TOKENS)
    first, whole = answer(1), answer(OUTPUT_TOKENS)
    return {part: 1e3 * (whole[part] - first[part]) / (OUTPUT_TOKENS - 1) for part in whole}


def seconds_by_part(stats: pstats.Stats) -> dict[str, float]:
    """Own seconds of every function, summed by part."""
    found = dict.fromkeys([*PARTS, "the plugin around its operator", "all else of vLLM"], 0.0)
    entries: Mapping[tuple[str, int, str], tuple[int, int, float, float, Any]]
    entries = stats.stats  # type: ignore[attr-defined]
    for (file, _, function), (_, _, own, _, _) in entries.items():
        part = next((p for p, names in PARTS.items() if any(n in function for n in names)), None)
        if part is None:
            inside = PLUGIN in Path(file).parts
            part = "the plugin around its operator" if inside else "all else of vLLM"
        found[part] += own
    return found


def show(parts: Mapping[str, float]) -> None:
    """Print the parts as a table."""
    table = Table(title="one decoded token")
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = sum(parts.values())
    for part, milliseconds in parts.items():
        table.add_row(part, f"{milliseconds:.2f}", f"{milliseconds / total:.0%}")
    table.add_row("together", f"{total:.2f}", "100%")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(LLAMA_SHAPES), default="tinyllama")
    parser.add_argument("--values", choices=["dense", "auto", "int8"], default="int8")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    model = random_llama(options.model)
    if options.values != "dense":
        model = magnitude_pruned(model, values=options.values)
    parts = profile(model)
    show(parts)
    rows = [{"part": part, "milliseconds": value} for part, value in parts.items()]
    facts = {"model": options.model, "values": options.values, "threads": torch.get_num_threads()}
    write_json(options.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
