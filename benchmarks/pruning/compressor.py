"""llm-compressor, which `one_shot.py` calls in an environment of its own."""

import subprocess
from pathlib import Path

ONE_SHOT = Path(__file__).with_name("one_shot.py")
INSTALL = "python -m venv COMPRESSOR && COMPRESSOR/bin/pip install llmcompressor==0.14.0.1"


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
                f"made by: {INSTALL}"
            )
        self.version = found.stdout.strip()

    def compress(self, model: Path, output: Path, bits: int, windows: Path) -> None:
        """Write the model with weights of so many bits.

        Raises:
            subprocess.CalledProcessError: it failed; it has said why.
        """
        options = ["--bits", str(bits), "--windows", str(windows)]
        subprocess.run([self._python, ONE_SHOT, model, output, *options], check=True)
