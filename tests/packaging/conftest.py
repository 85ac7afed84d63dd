"""The source distribution and the wheel, built once from a copy of the sources.

The copy takes the compiled objects along, so that building is linking. What an older build may
have left behind is planted in it: none of that may get into a wheel.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.offline.tiny_models import tiny_llama

ROOT = Path(__file__).parents[2]
SKIPPED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "*.so")
STALE = ("permllm_vllm/_C_cuda.so", "permllm_vllm/removed_module.py")
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({output!r})"


@dataclass(frozen=True)
class Distributions:
    """What was built: two archives, and the unpacked source distribution."""

    sdist: Path
    sources: Path
    wheel: Path


def build(kind: str, sources: Path, output: Path, **environment: str) -> Path:
    """Build an `sdist` or a `wheel` as pip does; it is the only file in `output`."""
    output.mkdir()
    subprocess.run(
        [sys.executable, "-c", BUILD.format(kind=kind, output=str(output))],
        cwd=sources,
        env={**os.environ, "PERMLLM_BUILD_CUDA": "0", "PYTHONPATH": "", **environment},
        check=True,
        capture_output=True,
    )
    (archive,) = output.iterdir()
    return archive


def install(wheel: Path, environment: Path) -> None:
    """Install a wheel into a new virtual environment, with no compiler in reach.

    What it depends on comes from the environment of the tests, by a path file: path files of that
    one, and so its editable installation of this project, are not read again.
    """
    venv.create(environment, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(environment)}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run(
        [*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)],
        env={**os.environ, "PATH": "", "PYTHONPATH": ""},
        check=True,
    )


def run_installed(
    environment: Path, *command: str | Path, cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run the Python of an environment, with no compiler in reach."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PERMLLM")}
    return subprocess.run(
        [str(environment / "bin" / "python"), *map(str, command)],
        cwd=cwd,
        env={**kept, "PATH": "", "PYTHONPATH": ""},
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """The source distribution, and the wheel that is built from nothing but it."""
    if shutil.which("c++") is None and "CXX" not in os.environ:
        pytest.skip("no C++ compiler to build the kernels with")
    directory = tmp_path_factory.mktemp("distributions")
    copy = directory / "copy"
    shutil.copytree(ROOT, copy, ignore=SKIPPED)
    plant_stale(copy)
    sdist = build("sdist", copy, directory / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(directory, filter="data")
    sources = directory / sdist.name.removesuffix(".tar.gz")
    objects = ROOT / "build" / "objects"
    if objects.is_dir():
        # Not those of CUDA, which another test may be building.
        copied = shutil.ignore_patterns("cuda")
        shutil.copytree(objects, sources / "build" / "objects", ignore=copied)
    plant_stale(sources)
    return Distributions(sdist, sources, build("wheel", sources, directory / "wheel"))


@pytest.fixture(scope="session")
def tiny_model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model, to be pruned by what is installed."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    tiny_llama().save_pretrained(directory)
    return directory


def plant_stale(sources: Path) -> None:
    """Leave what builds of another day leave: libraries in the package, and all of `build/lib*`."""
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    library = sources / "build" / f"lib.linux-x86_64-cpython-{version}"
    for stale in STALE:
        for place in (library, sources / "build" / "lib"):
            (place / stale).parent.mkdir(parents=True, exist_ok=True)
            (place / stale).write_text("")
    (sources / STALE[0]).write_text("")
