"""The table of the output head."""

from typing import Any

from benchmarks.tables import VIEWS


def row(m: int, peer: str, ratio: float, n: int = 32000) -> dict[str, Any]:
    """Ours reads three quarters of a bfloat16 weight's bytes, at 30.04 GB/s."""
    ours = 1.5 * n * 2048 / 30.04e3
    return {
        "n": n, "k": 2048, "m": m, "peer": peer, "peer_us": ratio * ours, "ratio": ratio,
        "gigabytes_per_second": 30.04,
    }  # fmt: skip


def test_a_head_has_a_line_for_each_peer_and_each_rate() -> None:
    rows = [row(1, "torch", 3.0), row(1, "vllm", 2.0), row(4, "vllm", 1.5), row(4, "torch", 2.496)]
    assert VIEWS["head"]({"rows": rows}).splitlines() == [
        "| head of | N x K |  | M = 1 | M = 4 |",
        "|---|---|---|---|---|",
        "| TinyLlama-1.1B | 32000 x 2048 | x vLLM's | 2.00 | 1.50 |",
        "| TinyLlama-1.1B | 32000 x 2048 | x PyTorch's | 3.00 | 2.50 |",
        "| TinyLlama-1.1B | 32000 x 2048 | GB/s | 30.0 | 30.0 |",
        "| TinyLlama-1.1B | 32000 x 2048 | GB/s, vLLM's | 20.0 | 26.7 |",
    ]


def test_what_was_not_measured_is_left_out() -> None:
    rows = [row(1, "torch", 3.0), row(2, "torch", 3.0, n=64)]
    assert VIEWS["head"]({"rows": rows}).splitlines()[2:] == [
        "| TinyLlama-1.1B | 32000 x 2048 | x PyTorch's | 3.00 |  |",
        "| TinyLlama-1.1B | 32000 x 2048 | GB/s | 30.0 |  |",
        "|  | 64 x 2048 | x PyTorch's |  | 3.00 |",
        "|  | 64 x 2048 | GB/s |  | 30.0 |",
    ]
