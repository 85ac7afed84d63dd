"""What is fuzzed, and how many of a campaign's inputs each target gets.

The readers and the layers of vLLM are fuzzed with inputs that reach new Python code. The operators,
`linear`, `experts` and `pack`, are compiled without coverage: their arguments are generated, and
nothing guides them (`make sanitize` runs the same kernels under sanitizers).

Covered elsewhere, because a whole model must be loaded for it: what vLLM makes of damaged dense
tensors (tests/quantization/test_model_loader.py), and what Transformers, which reads through the
readers that are fuzzed here, makes of a damaged checkpoint (tests/hf/test_hf.py).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple


class Target(NamedTuple):
    """A function of a module of this package, and its share in parts per thousand."""

    module: str
    function: str
    share: int

    @property
    def run(self) -> Callable[[bytes], None]:
        """Takes one input and raises for a bug; its module is imported for it alone."""
        found: Callable[[bytes], None] = getattr(
            import_module(f"tests.fuzzing.{self.module}"), self.function
        )
        return found


TARGETS = {
    "config": Target("checkpoints", "config", 200),
    "index": Target("checkpoints", "index", 185),
    "checksums": Target("checkpoints", "checksums", 100),
    "file": Target("checkpoints", "file", 205),
    "layers": Target("checkpoints", "layers", 20),
    "contents": Target("checkpoints", "contents", 100),
    "vllm": Target("vllm_layers", "layers", 50),
    "bitmask": Target("bitmasks", "bitmask", 30),
    "linear": Target("operators", "linear", 70),
    "experts": Target("experts", "experts", 15),
    "pack": Target("operators", "pack", 25),
}
