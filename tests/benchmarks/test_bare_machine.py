"""That a machine with a GPU needs few packages for `make gpu`."""

import os
import subprocess
import sys

from benchmarks.cuda.steps import ROOT

BARE = ("vllm", "pydantic", "transformers", "safetensors", "rich")
IMPORT_ALL = """
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is not on the machine", name=name)

sys.meta_path.insert(0, Blocked())
import benchmarks.cuda
names = [module.name for module in pkgutil.iter_modules(benchmarks.cuda.__path__)]
assert {"kernels", "generation", "pruned"} <= set(names)
for name in ("benchmarks.gpu", *(f"benchmarks.cuda.{name}" for name in names),
             "tests.conftest", "tests.cuda.conftest", "tests.cuda.test_gpu",
             "tests.cuda.test_gpu_experts", "tests.cuda.smoke"):
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
