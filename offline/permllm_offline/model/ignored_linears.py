"""Linears that stay dense by choice: what the entries of `ignore` match, and may not match."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.ignoring import REGEX_PREFIX, check_entries, matches

MOST_SHOWN = 3
"""Of the names in a message: a layer may have hundreds of experts."""


def ignored_linears(
    entries: Sequence[str],
    groups: Sequence[Sequence[str]],
    dense: Sequence[str],
    mixtures: Sequence[Sequence[str]] = (),
) -> frozenset[str]:
    """Full names of the linears that entries leave dense, as whoever loads the checkpoint matches.

    Args:
        entries: full module names, or ``re:`` and a regular expression that matches whole ones.
        groups: full names of the linears of each shared-input group of the model.
        dense: names that ``ignore`` has in every checkpoint of the family.
        mixtures: full names of the linears of all experts of each layer that has any.

    Raises:
        OfflineError: an entry that cannot be used or matches no linear, a group or the experts of a
            layer of which only a part is matched, or nothing that is left to prune.
    """
    names = [name for group in groups for name in group]
    try:
        check_entries([*dense, *entries])
    except ValueError as error:
        raise OfflineError(f"--ignore cannot be used: {error}. Give other entries.") from error
    for entry in entries:
        if not _matched(entry, names):
            raise _no_match(entry, names, dense)
    found = frozenset(name for entry in entries for name in _matched(entry, names))
    for group in groups:
        _check_whole(
            group,
            found,
            "they read the same tensor, under one permutation, and vLLM serves them as one layer",
        )
    for experts in mixtures:
        _check_whole(experts, found, "vLLM serves the experts of a layer as one")
    if len(found) == len(names):
        raise OfflineError(
            f"--ignore leaves all {len(names)} linear layers dense, so there is nothing to prune: "
            "give fewer entries."
        )
    return found


def _matched(entry: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if matches(entry, name)]


def _check_whole(linears: Sequence[str], ignored: Collection[str], reason: str) -> None:
    """Raise OfflineError where some of the linears that belong together are ignored, others not."""
    inside = [name for name in linears if name in ignored]
    if not inside or len(inside) == len(linears):
        return
    others = [name for name in linears if name not in ignored]
    raise OfflineError(
        f"--ignore leaves {_shown(inside)} dense, but not {_shown(others)}: {reason}. Ignore all "
        "of them or none."
    )


def _shown(names: Sequence[str]) -> str:
    more = len(names) - MOST_SHOWN
    return ", ".join(names[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _no_match(entry: str, names: Sequence[str], dense: Sequence[str]) -> OfflineError:
    """Say of an entry that matches no linear what would match."""
    if _matched(entry, dense):
        return OfflineError(f"--ignore {entry} says nothing: it is dense anyway. Leave it out.")
    return OfflineError(
        f"--ignore {shlex.quote(entry)} matches no linear layer that would be pruned. An entry is "
        f"a name in full, or {REGEX_PREFIX} and a regular expression that matches whole names. Did "
        f"you mean {' or '.join(map(shlex.quote, _near(entry, names)))}?"
    )


def _near(entry: str, names: Sequence[str]) -> list[str]:
    """Entries that match something and look like one that does not."""
    text = entry.removeprefix(REGEX_PREFIX)
    part = text if entry != text else re.escape(text)
    part = f"(?:{part})" if "|" in text else part
    for regex in (rf"{part}\..*", rf".*\.{part}", rf".*{part}.*", text) if text else ():
        if _is_usable(REGEX_PREFIX + regex) and _matched(REGEX_PREFIX + regex, names):
            return [REGEX_PREFIX + regex]
    kinds = {name.rpartition(".")[2]: name for name in reversed(names)}
    return get_close_matches(text, names, 3) or [*reversed(kinds.values())]


def _is_usable(entry: str) -> bool:
    try:
        check_entries([entry])
    except ValueError:
        return False
    return True
