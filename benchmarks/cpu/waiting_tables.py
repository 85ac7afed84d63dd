"""Table of the documentation on how threads wait."""

from benchmarks.records.markdown import Result, markdown


def waits(result: Result) -> str:
    """A line per way of waiting: seconds of a step, and tokens/s."""
    found = {(row["work"], row["way"], row["beside"]): row["seconds"] for row in result["rows"]}
    lines = [
        [
            f"`{way}`" if "=" in way else way,
            *(_cell(found.get(("gradients", way, beside))) for beside in (False, True)),
            *(_cell(found.get(("decoding", way, beside)), rate=True) for beside in (False, True)),
        ]
        for way in dict.fromkeys(row["way"] for row in result["rows"])
    ]
    step, tokens = "step of gradients, s", "tokens/s"
    header = ["threads wait", step, "beside a busy program", tokens, "beside a busy program"]
    return markdown(header, lines)


def _cell(seconds: float | None, *, rate: bool = False) -> str:
    return "" if seconds is None else f"{1 / seconds if rate else seconds:.1f}"
