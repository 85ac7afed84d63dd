"""What may come of an input: the right answer, or an error that says what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from permllm_vllm.checkpoint.errors import CheckpointError

T = TypeVar("T")
LONGEST_MESSAGE = 20_000
_INTERNAL = re.compile(r"INTERNAL ASSERT|not enough memory|can't allocate|bad_alloc|NULL|nullptr")


class Finding(AssertionError):
    """A bug: a wrong answer, a damaged input that was accepted, a good one that was refused."""


class Refused(Exception):
    """The input was refused with a clear error."""


def refusing(call: Callable[[], T], *errors: type[Exception]) -> T:
    """Return what `call` returns; raises `Refused` for a clear error, of `errors` where given.

    Any other exception is a bug and arrives as it is.
    """
    kinds = errors or (CheckpointError,)
    try:
        return call()
    except kinds as error:
        message = str(error)
        if isinstance(error, CheckpointError):
            clear = "rule:" in message and "remedy:" in message
        else:
            clear = len(message) > 20 and _INTERNAL.search(message) is None
        if not clear or len(message) > LONGEST_MESSAGE:
            raise Finding(f"an unclear error: {type(error).__name__}: {message[:300]}") from error
        raise Refused from error
