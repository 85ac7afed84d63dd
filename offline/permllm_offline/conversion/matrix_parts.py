"""Matrices that a checkpoint stores in several tensors: all are there, and no dense one beside."""

from __future__ import annotations

from collections.abc import Container, Iterable

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem


def require_parts(
    stored: Container[str], module: str, form: str, parts: Iterable[str], dense: Iterable[str]
) -> None:
    """Check the tensors of one matrix by their names.

    Args:
        stored: names of all tensors.
        module: that the matrix belongs to.
        form: what it is called: packed, for example.
        parts: the kinds of its tensors.
        dense: kinds of the dense tensors that these stand for.

    Raises:
        CheckpointError: a part is missing, or a dense tensor is there too.
    """
    kinds = ", ".join(parts := list(parts))
    for kind in parts:
        if f"{module}.{kind}" not in stored:
            rule = f"a {form} matrix has {kinds}"
            raise Problem(f"{module}.{kind}", "nothing", rule, FETCH_AGAIN).as_error()
    for kind in dense:
        if f"{module}.{kind}" in stored:
            value, rule = f"a second, dense {kind}", f"it is in {kinds} alone"
            raise Problem(f"{module}.{kind}", value, rule, FETCH_AGAIN).as_error()
