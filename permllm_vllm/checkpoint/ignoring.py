"""Match module names against `ignore`, in time linear in their length.

A checkpoint may come from anywhere, and Python's `re` takes exponential time for some patterns.
pydantic's engine (Rust's `regex`) never does; it has no look-around and no back-references.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from pydantic_core import SchemaError, SchemaValidator, core_schema

REGEX_PREFIX = "re:"
LONGEST_REGEX = 300  # characters, so that memory is bounded too
MOST_REGEXES = 100


def matches(entry: str, module_name: str) -> bool:
    """Tell whether an entry of `ignore`, a full name or `re:` and a regex, matches the full name.

    Raises `ValueError` when the regular expression cannot be used.
    """
    if not entry.startswith(REGEX_PREFIX):
        return entry == module_name
    return _matcher(entry.removeprefix(REGEX_PREFIX)).isinstance_python(module_name)


def check_entries(entries: Sequence[str]) -> None:
    """Raise `ValueError` that says why, when an entry of `ignore` cannot be used."""
    regexes = [entry for entry in entries if entry.startswith(REGEX_PREFIX)]
    if len(regexes) > MOST_REGEXES:
        raise ValueError(
            f"{len(regexes)} regular expressions; at most {MOST_REGEXES} are read, join some"
        )
    for entry in regexes:
        _matcher(entry.removeprefix(REGEX_PREFIX))


@lru_cache(maxsize=MOST_REGEXES)
def _matcher(regex: str) -> SchemaValidator:
    if len(regex) > LONGEST_REGEX:
        raise ValueError(
            f"a regular expression of {len(regex)} characters; at most {LONGEST_REGEX} are read"
        )
    _compile(regex)  # alone first: "a)|(b" must not become valid inside the group
    return _compile(rf"\A(?:{regex})\z")


def _compile(regex: str) -> SchemaValidator:
    try:
        return SchemaValidator(core_schema.str_schema(pattern=regex, regex_engine="rust-regex"))
    except (SchemaError, UnicodeEncodeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ValueError(
            f"{REGEX_PREFIX + regex!r} is no regular expression that can be matched in linear time "
            f"(no look-around, no back-references): {reason}"
        ) from None
