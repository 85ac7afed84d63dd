"""Tables of the documentation on what learning and whole prunes cost."""

from collections.abc import Mapping
from typing import Any

from benchmarks.pruning.prune_parts import PARTS, REFERENCE, REST, with_rest
from benchmarks.records.markdown import Result, markdown

_RATIOS = {"dense": "x dense", "wanda": "x Wanda"}


def learning_steps(result: Result) -> str:
    """Seconds and memory of a learning step of one layer: the paper's dense loop, and ours."""
    by_width: dict[int, dict[str, Mapping[str, Any]]] = {}
    for step in result["steps"]:
        by_width.setdefault(step["width"], {})[step["loop"]] = step
    rows = []
    for width, loops in by_width.items():
        dense, ours = loops["dense"], loops["ours"]
        ratio = dense["seconds"] / ours["seconds"]
        rows.append([f"{width}", f"{dense['seconds']:.3f}", f"{ours['seconds']:.3f}"])
        peaks = (dense["peak_mib"], ours["peak_mib"])  # None where the system does not tell
        rows[-1] += [f"{ratio:.1f}x", *("" if peak is None else f"{peak:.0f}" for peak in peaks)]
    header = ["channels", "dense loop, s", "ours, s", "times as fast"]
    return markdown([*header, "dense loop, MiB", "ours, MiB"], rows)


def time_to_quality(result: Result) -> str:
    """Time and perplexities of the dense loop, and of ours with more and more steps.

    Shares are of processor time where the result has it, else of the seconds that went by. The
    dense model and Wanda stand in front where the result has them, and ratios to both. A cell
    without a measurement stays empty.
    """
    baseline, references = result["baseline"], result.get("references", {})
    runs = (baseline, *result["ours"])
    measured = [*references.values(), *(run["perplexity"] for run in runs)]
    domains = list(dict.fromkeys(domain for found in measured for domain in found))

    def qualities(perplexity: Mapping[str, float]) -> list[str]:
        cells = []
        for domain in domains:
            value = perplexity.get(domain)
            cells.append("" if value is None else f"{value:.1f}")
            for reference in references.values():
                both = value is not None and domain in reference
                cells.append(f"{value / reference[domain]:.2f}" if both else "")
        return cells

    times = {"seconds": "seconds", "processor_seconds": "processor seconds"}
    times = {key: title for key, title in times.items() if key in baseline}
    shared = list(times)[-1]
    names = {"dense": "dense model", "wanda": "Wanda, nothing learned"}
    blank = [""] * (2 + len(times))
    rows = [[names[key], *blank, *qualities(references[key])] for key in references]
    for run in runs:
        row = ["the paper's dense loop" if run is baseline else "ours", str(run["steps"])]
        row += [f"{run[key]:.0f}" for key in times]
        row.append(f"{run[shared] / baseline[shared]:.2f}")
        rows.append([*row, *qualities(run["perplexity"])])
    header = ["loop", "steps", *times.values(), "share of time"]
    for domain in domains:
        header += [f"perplexity, {domain}", *(_RATIOS[name] for name in references)]
    return markdown(header, rows)


def pipeline(result: Result) -> str:
    """A whole prune by method: minutes, memory, and the processor seconds of its parts."""
    rows = result["rows"]
    parts = [REST, *(part for part in PARTS if any(part in row["parts"] for row in rows))]
    known = [row["processor_seconds"] for row in rows if row["method"] == REFERENCE]
    lines = []
    for row in rows:
        note = "" if row.get("checkpoint", True) else " (no checkpoint)"
        line = [f"`{row['method']}`{note}", f"{row['seconds'] / 60:.1f}"]
        line.append(f"{row['processor_seconds'] / 60:.1f}")
        line.append(f"{row['processor_seconds'] / known[0]:.1f}" if known else "")
        line.append(f"{row['peak_bytes'] / 2**20:.0f}")
        seconds = with_rest(row)
        line += [f"{seconds[part]:.0f}" if part in seconds else "" for part in parts]
        loops = [part for part in row["parts"].values() if "steps" in part]
        line.append(", ".join(f"{part['processor_seconds'] / part['steps']:.2f}" for part in loops))
        lines.append(line)
    header = ["method", "minutes", "processor minutes", f"x `{REFERENCE}`", "peak MiB"]
    header += [f"{part}, processor s" for part in parts]
    return markdown([*header, "a step, processor s"], lines)
