"""The table of the documentation on the output head."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.records.markdown import Result, markdown
from benchmarks.shapes import HEADS

Row = Mapping[str, Any]
LINES: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("x vLLM's", "vllm", lambda row: f"{row['ratio']:.2f}"),
    ("x PyTorch's", "torch", lambda row: f"{row['ratio']:.2f}"),
    ("GB/s", "torch", lambda row: f"{row['gigabytes_per_second']:.1f}"),
    ("GB/s, vLLM's", "vllm", lambda row: f"{2 * row['n'] * row['k'] / row['peer_us'] / 1e3:.1f}"),
)
"""Label of a line, the peer whose rows it shows, and what it shows of each."""


def heads(result: Result) -> str:
    """Times as fast as the peers, and the rates of reading: lines of each head, a column per M."""
    rows = {(row["n"], row["k"], row["m"], row["peer"]): row for row in result["rows"]}
    tokens = sorted({m for _, _, m, _ in rows})
    models = {shape: model for model, shape in HEADS.items()}
    lines = []
    for n, k in dict.fromkeys((n, k) for n, k, _, _ in rows):
        for label, peer, shown in LINES:
            of_line = [rows.get((n, k, m, peer)) for m in tokens]
            if any(of_line):
                cells = ["" if row is None else shown(row) for row in of_line]
                lines.append([models.get((n, k), ""), f"{n} x {k}", label, *cells])
    return markdown(["head of", "N x K", "", *(f"M = {m}" for m in tokens)], lines)
