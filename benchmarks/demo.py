"""The whole line on a real model: prune, evaluate, serve, and compare with dense.

    python -m benchmarks.demo

Everything it writes is below `build/demo`; everything it starts, it stops.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from permllm_offline.inspection.contents import Inspection, inspect

from .engines.engine import Engine
from .engines.server import serve
from .models import random_model, smollm2
from .pruning.commands import evaluate, magnitude_pruned, prune
from .records.machine import machine, revision, write_json
from .serving import compare
from .texts import sotu

METHODS: Mapping[str, Sequence[str]] = {"wanda": (), "permllm-best": ("--effort", "low")}
"""With their options: a mask alone, and the default in half of its time."""

EVALUATION_WINDOWS = 64
QUESTION = "What is the capital of France? Answer in one sentence."


def linear_bytes(inspection: Inspection) -> dict[str, int]:
    """Bytes of the pruned linears, sparse and as dense bfloat16."""
    return {"sparse": inspection.bytes, "dense": inspection.dense_bytes}


def chat(checkpoint: Path) -> str:
    """Serve a checkpoint with the real `vllm serve` and return its answer to one question."""
    print(f"\n$ vllm serve {checkpoint} --quantization permllm", flush=True)
    arguments = ("--quantization", "permllm", "--max-model-len", "1024", "--enforce-eager")
    with serve(checkpoint, *arguments) as server:
        print(server.backend_line(), flush=True)
        answer = server.client().chat.completions.create(
            model=str(checkpoint),
            messages=[{"role": "user", "content": QUESTION}],
            max_tokens=48,
            temperature=0.0,
        )
    return answer.choices[0].message.content or ""


def summary(
    pattern: str, perplexities: dict[str, float], sizes: dict[str, int], rows: list[dict]
) -> Table:
    """Dense against sparse, a line per figure."""
    dense, sparse = rows[0], rows[1]
    table = Table(title=f"dense against {pattern} sparse on {machine()['cpu']}")
    for column in ("", "dense", "sparse", "sparse / dense"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row(
        "SmolLM2-135M, pruned linears (MB)",
        f"{sizes['dense'] / 1e6:.1f}",
        f"{sizes['sparse'] / 1e6:.1f}",
        f"{sizes['sparse'] / sizes['dense']:.3f}",
    )
    for method, more in METHODS.items():
        table.add_row(
            " ".join(["SmolLM2-135M, perplexity,", method, *more]),
            f"{perplexities['dense']:.1f}",
            f"{perplexities[method]:.1f}",
            f"{perplexities[method] / perplexities['dense']:.2f}",
        )
    table.add_row(
        "TinyLlama shape, decode tokens/s, batch 1",
        f"{dense['decode_tokens_per_second']:.1f}",
        f"{sparse['decode_tokens_per_second']:.1f}",
        f"{sparse['decode_ratio']:.2f}",
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("build/demo"))
    output: Path = parser.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    start, begun = time.monotonic(), revision()

    model, texts = smollm2(), sotu()
    perplexities = {
        "dense": evaluate(
            model, texts.held_out, output / "eval-dense.json", windows=EVALUATION_WINDOWS
        )
    }
    for method, more in METHODS.items():
        checkpoint = output / f"SmolLM2-135M-{method}"
        prune(
            *(model, checkpoint, "--method", method),  # the pattern is that of this machine
            *("--dataset", texts.calibration, "--sequence-length", "512", "--force"),
            *more,
        )
        perplexities[method] = evaluate(
            checkpoint,
            texts.held_out,
            output / f"eval-{method}.json",
            windows=EVALUATION_WINDOWS,
        )
    found = inspect(checkpoint)
    pattern, sizes = found.pattern, linear_bytes(found)
    answer = chat(checkpoint)

    print("\nDecode speed on TinyLlama's shape, random weights, dense and sparse in turn:")
    dense = random_model("tinyllama")
    models = {"dense": dense, "sparse": magnitude_pruned(dense, pattern=pattern)}
    rows = compare(list(models), [(1, 32)], lambda name: Engine(models[name], eager=True))
    seconds = time.monotonic() - start
    write_json(
        output / "demo.json",
        {
            "pattern": pattern,
            "perplexity": perplexities,
            "pruned_linear_bytes": sizes,
            "decode": rows,
            "question": QUESTION,
            "answer": answer,
            "seconds": round(seconds),
        },
        begun,
    )
    for row in rows:
        if "refused" in row:
            raise SystemExit(f"vLLM does not serve the {row['variant']} model: {row['refused']}")

    console = Console()
    console.print(f"\n[bold]{QUESTION}[/bold]\n{answer}\n")
    console.print(summary(pattern, perplexities, sizes, rows))
    print(
        f"A 135M model loses far more to {pattern} than a 7B one, and its answers show it;\n"
        "see the README for what to expect at larger sizes."
    )
    print(f"{output / 'demo.json'} written after {seconds / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
