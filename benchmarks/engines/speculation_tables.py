"""Tables of the documentation on speculative decoding."""

from benchmarks.records.markdown import Result, markdown

ARBITRARY = "arbitrary"
"""The text of a model with random weights: how often its drafts are right says nothing."""


def speculation(result: Result) -> str:
    """A line per target, draft, drafted tokens and text: what a step takes, yields and gains."""
    lines = []
    for row in result["rows"]:
        case = [row["target"], row["draft"], str(row["drafted"]), row["text"], str(row["batch"])]
        if "refused" in row:
            lines.append([*case, "refused", "", "", "", ""])
            continue
        times = [f"{row['step_ms']:.0f} ms ({row['step_ratio']:.2f}x)"]
        gains = [f"{row['tokens_per_step']:.2f}"]
        gains += [f"{row[name]:.2f}x" for name in ("ratio", "dense_ratio")]
        times += [""] * len(gains) if row["text"] == ARBITRARY else gains
        memory = f"{row['resident_mib']:.0f} ({row['alone_resident_mib']:.0f})"
        lines.append([*case, *times, memory])
    header = ["target", "draft", "drafted", "text", "sequences"]
    header += ["step (to a token of the target alone)", "tokens a step"]
    header += ["to the target alone", "to dense bfloat16", "resident MiB (target alone)"]
    return markdown(header, lines)
