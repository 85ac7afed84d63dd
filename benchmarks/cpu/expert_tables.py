"""The table of the documentation on sparse experts."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.records.markdown import Result, markdown

Row = Mapping[str, Any]


def _rate_of_peer(row: Row) -> str:
    """GB/s at which a peer reads the weights of the experts that tokens go to, 2 bytes each."""
    hit = min(row["m"] * row["choices"], row["experts"])
    size = 3 * row["hidden"] * row["inner"] * (1 if "int8" in row["peer"] else 2)
    return f"{hit * size / row['peer_us'] / 1e3:.1f}"


def experts(result: Result) -> str:
    """Times as fast as the peers, and rates of reading: a column for each number of tokens."""
    rows = {(row["model"], row["values"], row["peer"], row["m"]): row for row in result["rows"]}
    tokens = sorted({row["m"] for row in rows.values()})
    lines = []

    def add(
        key: tuple[str, str, str], values: str, label: str, shown: Callable[[Row], str]
    ) -> None:
        of_line = [rows.get((*key, m)) for m in tokens]
        cells = ["" if row is None else shown(row) for row in of_line]
        lines.append([key[0], values, label, *cells])

    keys = list(dict.fromkeys(key[:3] for key in rows))
    for key in keys:
        add(key, key[1], f"x {key[2]}", lambda row: f"{row['ratio']:.2f}")
    for key in keys:
        if key[2] == "vllm":
            add(key, key[1], "GB/s", lambda row: f"{row['gigabytes_per_second']:.1f}")
    for key in dict.fromkeys((model, keys[0][1], peer) for model, _, peer in keys):
        add(key, "dense", f"GB/s, {key[2]}", _rate_of_peer)
    lines.sort(key=lambda line: list(dict.fromkeys(key[0] for key in keys)).index(line[0]))
    return markdown(["experts of", "values", "", *(f"M = {m}" for m in tokens)], lines)
