"""What is said when a checkpoint, or something about to be written to one, breaks a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

FETCH_AGAIN = "fetch or write the checkpoint again"
"""The remedy where what is stored is damaged."""

_SHOWN = 20
_LONGEST = 300  # characters of one part of a message: what a checkpoint holds may be any length


@dataclass(frozen=True)
class Problem:
    """One broken rule.

    `tensor` names the tensor (or the file, or the configuration key) that breaks it, `value` what
    was found there, `rule` what the format asks for, `remedy` what to do about it.
    """

    tensor: str
    value: str
    rule: str
    remedy: str

    def __str__(self) -> str:
        tensor, value, rule = map(_cut, (self.tensor, self.value, self.rule))
        return f"{tensor}: found {value}; rule: {rule}; remedy: {self.remedy}"

    def as_error(self) -> CheckpointError:
        """Return the error to raise for this problem alone."""
        return CheckpointError(str(self), [self])


class CheckpointError(ValueError):
    """A checkpoint breaks a rule of the format; the message gives value, rule and remedy.

    `problems` lists the broken rules one by one where they are known that way.
    """

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = list(problems)


def raise_if_any(problems: Sequence[Problem]) -> None:
    """Raise one `CheckpointError` that lists `problems`, or return when there are none."""
    if not problems:
        return
    if len(problems) == 1:
        raise problems[0].as_error()
    lines = [f"{len(problems)} problems:"]
    lines += [f"  {problem}" for problem in problems[:_SHOWN]]
    if len(problems) > _SHOWN:
        lines.append(f"  ... and {len(problems) - _SHOWN} more")
    raise CheckpointError("\n".join(lines), problems)


def _cut(text: str) -> str:
    """Shorten text in its middle, and escape what a terminal would obey or refuse to print."""
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else repr(text)
