"""llm-compressor, which `one_shot.py` calls in an environment of its own."""

import subprocess
from pathlib import Path

from benchmarks.dense_quantization.values import Key

ONE_SHOT = Path(__file__).with_name("one_shot.py")


class Compressor:
    """llm-compressor in a Python of its own.

    Args:
        python: its interpreter.

    Raises:
        ValueError: that cannot be run, or has no llm-compressor.
    """

    def __init__(self, python: Path) -> None:
        self._python = python
        asked = "import importlib.metadata as m; print(m.version('llmcompressor'))"
        try:
            found = subprocess.run([python, "-c", asked], capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"{python}: no Python that can be run: {error.strerror}") from error
        if found.returncode:
            raise ValueError(
                f"{python} has no llm-compressor: give the Python of an environment that has it, "
                "made by: python -m venv COMPRESSOR && COMPRESSOR/bin/pip install llmcompressor"
            )
        self.version = found.stdout.strip()

    def compress(self, model: Path, output: Path, key: Key, windows: Path) -> None:
        """Write the model in the values of a key.

        Raises:
            subprocess.CalledProcessError: it failed; it has said why.
        """
        values, group = key
        options = ["--values", values, "--windows", str(windows)]
        if group is not None:
            options += ["--group", str(group)]
        subprocess.run([self._python, ONE_SHOT, model, output, *options], check=True)
