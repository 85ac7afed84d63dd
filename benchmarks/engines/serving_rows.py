"""Rows of a serving result: those of one cell, and their ratios to dense in the same run."""

from collections.abc import Mapping
from typing import Any

from benchmarks.engines.weight_bytes import DecodedWeights

Row = Mapping[str, Any]

KEY = ("variant", "batch", "prompt_tokens")

TIMES = {"time_to_first_token_ms": "first_token_ratio"}
SPEEDS = {"decode_tokens_per_second": "decode_ratio"}
"""Quantities of a row, and the field that says how many times as fast as dense that is."""

OUTPUT_TOKENS = 32
"""Of every answer."""
DENSE, INT8, INT4 = "dense bfloat16", "vLLM int8 (W8A8)", "vLLM int4 (GPTQ)"


def share(row: Row, int4_group: int | None) -> float | None:
    """Of dense bfloat16: the bytes of a row's linear layers; None where nothing tells them.

    int4 has a scale of 16 bits and a zero of 4 bits for every `int4_group` values.
    """
    if "packed_ratio" in row:
        return float(row["packed_ratio"])
    if row["variant"] == INT4 and int4_group is not None:
        return (4 + 20 / int4_group) / 16
    return 1 / 2 if row["variant"] == INT8 else None


def with_ratios(
    row: Row,
    dense: Row | None,
    weights: DecodedWeights | None = None,
    int4_group: int | None = None,
) -> Row:
    """Add how many times as fast as dense a row is, and its share of dense's memory.

    Args:
        row: measured, or refused: those are returned as they are.
        dense: the row of dense in the same run; without it, or if it was refused, nothing is added.
        weights: of the model, for what its bytes alone explain at batch 1.
        int4_group: values that share a scale in vLLM's int4; see `quantized_peers`.
    """
    if dense is None or "refused" in dense or "refused" in row:
        return row
    ratios = {ratio: dense[name] / row[name] for name, ratio in TIMES.items() if name in row}
    ratios |= {ratio: row[name] / dense[name] for name, ratio in SPEEDS.items() if name in row}
    if "resident_mib" in row:
        ratios["resident_ratio"] = row["resident_mib"] / dense["resident_mib"]
    packed = share(row, int4_group)
    if weights is not None and packed is not None and row.get("batch") == 1:
        ratios["byte_ratio"] = weights.byte_ratio(packed, row.get("head_ratio", 1.0))
    return {**row, **ratios}


def repeats_of(batch: int, prompt: int) -> int:
    """How often to measure a cell: long prompts take minutes, and are steadier."""
    tokens = batch * prompt
    return 5 if tokens <= 256 else 3 if tokens <= 1024 else 2 if tokens <= 4096 else 1
