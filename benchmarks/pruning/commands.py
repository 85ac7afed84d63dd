"""The command `permllm-offline`, run as a user runs it and shown before it runs."""

import json
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.engines.twins import forget, is_twin, name_parent


def permllm_offline(*arguments: str | Path) -> None:
    """Run one sub-command; its output goes to this terminal.

    Raises:
        subprocess.CalledProcessError: it failed; it has said why.
    """
    words = [str(argument) for argument in arguments]
    print(f"\n$ permllm-offline {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "permllm_offline", *words], check=True)


def prune(model: Path, output: Path, *options: str | Path) -> None:
    """Prune a model, without the steps of a run that was stopped: they may be of other sources.

    A time is that of a whole prune, and steps of a model that was made anew since are no obstacle.
    """
    permllm_offline("prune", model, "--output", output, "--restart", *options)


def ended(what: str, status: int) -> str:
    """Say how something ended, by its exit status, negative for a signal."""
    if status < 0:
        return f"{what} was killed by {signal.Signals(-status).name}: is there enough memory?"
    return f"{what} ended with status {status}"


def evaluate(model: Path, dataset: Path, output: Path, *, windows: int) -> float:
    """Perplexity of a checkpoint over windows of 512 tokens; the full record goes to `output`."""
    permllm_offline(
        *("eval", model, "--dataset", dataset, "--sequence-length", "512"),
        *("--max-windows", str(windows), "--json", output),
    )
    record: dict[str, Any] = json.loads(output.read_text())
    return float(record["perplexity"])


def magnitude_pruned(dense: Path, *, values: str = "auto", pattern: str = "2:4") -> Path:
    """Return the magnitude-pruned twin of a checkpoint, made once, beside it."""
    suffix = f"magnitude-{pattern.replace(':', 'to')}"
    suffix += "" if values == "auto" else f"-{values}"
    output = dense.with_name(f"{dense.name}-{suffix}")
    if not is_twin(output, dense):
        forget(output)
        prune(dense, output, "--method", "magnitude", "--pattern", pattern, "--values", values)
        name_parent(output, dense)
    return output
