"""One process of a campaign: `python -m tests.fuzzing.worker TARGET INPUTS SEED [BUG]`.

atheris runs the target on inputs that reach new Python code, the only code that it sees; it ends
the process with status 77 and the input's bytes at a finding, and likewise at a crash, a hang or
more memory than allowed.
"""

from __future__ import annotations

import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import atheris

LONGEST_INPUT = 256
SECONDS_PER_INPUT = 60  # as much as a busy machine may need; usually less than 0.01
MEGABYTES = 3000
SEEDS = 64
INSTRUMENTED = [
    "permllm_vllm.checkpoint", "permllm_vllm.backends", "permllm_vllm.quantization",
    "permllm_offline.conversion",
]  # fmt: skip


def main() -> None:
    target, inputs, seed, *bugs = sys.argv[1:]
    import torch

    from tests.fuzzing.targets import TARGETS

    with atheris.instrument_imports(include=INSTRUMENTED, enable_loader_override=False):
        run = TARGETS[target].run
    torch.set_num_threads(1)
    with ExitStack() as stack, tempfile.TemporaryDirectory() as corpus:
        for name in bugs:
            from tests.fuzzing.planted import BUGS

            stack.enter_context(BUGS[name].planted())
        shuffle = random.Random(int(seed))
        for number in range(SEEDS):
            data = shuffle.randbytes(shuffle.randint(1, LONGEST_INPUT))
            Path(corpus, str(number)).write_bytes(data)
        options = {
            "runs": inputs, "seed": seed, "max_len": LONGEST_INPUT, "len_control": 0,
            "timeout": SECONDS_PER_INPUT, "rss_limit_mb": MEGABYTES, "print_final_stats": 1,
            "artifact_prefix": f"{tempfile.gettempdir()}/permllm-fuzz-",
        }  # fmt: skip
        arguments = [f"-{name}={value}" for name, value in options.items()]
        atheris.Setup([sys.argv[0], *arguments, corpus], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
