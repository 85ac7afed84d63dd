"""That a machine with a GPU needs few packages for `make gpu`."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BARE = ("vllm", "pydantic", "transformers", "safetensors", "rich")
IMPORT_ALL = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is not on the machine", name=name)

sys.meta_path.insert(0, Blocked())
for name in ("benchmarks.cuda.kernels", "tests.conftest", "tests.cuda.conftest",
             "tests.cuda.test_gpu"):
    importlib.import_module(name)
print(*sorted(set(sys.argv[1:]) & set(sys.modules)))
"""


def test_everything_imports_on_a_bare_machine():
    """PyTorch, pytest and hypothesis are all that what `make gpu` runs may ask for at once."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *BARE],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""
