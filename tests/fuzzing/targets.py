"""What is fuzzed, and how many of a campaign's inputs each target gets.

Covered elsewhere, because an engine must run for it: what vLLM makes of a damaged checkpoint
(tests/quantization/test_damaged_checkpoints.py) and what Transformers makes of one
(tests/hf/test_hf.py). Both read it through the readers that are fuzzed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tests.fuzzing import checkpoints, conversions, operators


class Target(NamedTuple):
    """`run` takes one input and raises for a bug; `share` is in parts per thousand."""

    run: Callable[[bytes], None]
    share: int


TARGETS = {
    "config": Target(checkpoints.config, 220),
    "index": Target(checkpoints.index, 230),
    "checksums": Target(checkpoints.checksums, 100),
    "file": Target(checkpoints.file, 220),
    "layers": Target(checkpoints.layers, 20),
    "contents": Target(checkpoints.contents, 80),
    "bitmask": Target(conversions.bitmask, 24),
    "recovery": Target(conversions.recovery, 1),
    "linear": Target(operators.linear, 80),
    "pack": Target(operators.pack, 25),
}
