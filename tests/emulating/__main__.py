"""`make emulate`: the tests of the CPU kernels with AVX-512, AVX-VNNI and AMX in software.

For machines that lack them: `csrc/cpu` is compiled for AVX2, with the instructions beyond it as
plain loops (`avx512.h`, and the tile unit of `tests/kernels/amx`), so that every kernel runs and is
held against its oracle. How fast one is, and what the compiler makes of it, this does not tell.

    python -m tests.emulating
    python -m tests.emulating tests/kernels/test_cpu.py -k "avx512_bf16 and 2:4"
"""

from __future__ import annotations

import argparse
import shutil
import sys

from tests.emulating.build import build_library, pytest
from tests.mirror import ROOT, mirror
from tests.sanitizing.build import setup_module

FOLDER = ROOT / "build" / "emulated"
TESTS = ("tests/kernels", "--ignore=tests/kernels/amx")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.emulating",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _, arguments = parser.parse_known_args()
    reason = setup_module().reason_not_to_build()
    if reason:
        raise SystemExit(f"nothing can be emulated: {reason}")
    tree = FOLDER / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    build_library(FOLDER / "objects", mirror(tree))
    sys.exit(pytest(tree, *(arguments or TESTS)))


if __name__ == "__main__":
    main()
