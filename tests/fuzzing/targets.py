"""What is fuzzed, and how many of a campaign's inputs each target gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.fuzzing import checkpoints, operators


class Target(NamedTuple):
    """`run` takes one input and raises for a bug; `share` is in parts per thousand."""

    run: Callable[[bytes], None]
    share: int


TARGETS = {
    "config": Target(checkpoints.config, 250),
    "index": Target(checkpoints.index, 280),
    "file": Target(checkpoints.file, 250),
    "layers": Target(checkpoints.layers, 20),
    "contents": Target(checkpoints.contents, 80),
    "linear": Target(operators.linear, 90),
    "pack": Target(operators.pack, 30),
}
