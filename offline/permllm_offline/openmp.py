"""How the threads of OpenMP wait for work, which its runtime reads when torch loads it."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "GOMP_SPINCOUNT"
"""How often a thread looks for work before it sleeps, of GNU's runtime: torch's on Linux."""
CHOICES = (SPINS, "OMP_WAIT_POLICY")
FEW = "5000"
"""A tenth of a millisecond: longer than it takes until the next operator begins, as a rule."""


def let_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Let waiting threads give up their processor soon, unless the environment says how they wait.

    By default they keep it for several milliseconds. Where another program runs, a thread that is
    waited for may be one that has no processor, while the others hold theirs and do nothing.
    """
    if not any(name in environment for name in CHOICES):
        environment[SPINS] = FEW
