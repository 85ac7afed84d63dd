import configparser
import tarfile
from importlib.util import find_spec
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.packaging.conftest import (
    ROOT,
    STALE,
    Distributions,
    build,
    install,
    run_installed,
)

MULTIPLY = """
import permllm_vllm, torch
from benchmarks_shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends import select_backend
layer = random_layer(48, 128, "2:4", 64)
backend = select_backend(torch.device("cpu"), torch.bfloat16)
packed = backend.pack(layer.weights)
x = torch.randn(5, 128).to(torch.bfloat16)
found = ops.sparse_linear(x, packed.packed, packed.metadata, packed.permutation, packed.scale, None,
                          48, "2:4")
expected = x.double() @ layer.dense.double().T
print(permllm_vllm.__file__)
print(backend.name)
print(float((found.double() - expected).norm() / expected.norm()))
"""

FIND_PLUGIN = """
import sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.model_executor.layers.quantization import get_quantization_config
config = get_quantization_config("permllm")
print(config.__name__, sys.modules[config.__module__].__file__)
"""


@pytest.fixture(scope="module")
def installed(distributions: Distributions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = tmp_path_factory.mktemp("installed") / "environment"
    install(distributions.wheel, environment)
    return environment


def names(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_the_packages_and_the_library(distributions: Distributions) -> None:
    found = names(distributions.wheel)
    assert {name.split("/")[0].split("-")[0] for name in found} == {
        "permllm_vllm",
        "permllm_offline",
    }
    assert [name for name in found if name.endswith(".so")] == ["permllm_vllm/_C.so"]
    assert not found & set(STALE)
    modules = {
        path.relative_to(base).as_posix()
        for base in (ROOT, ROOT / "offline")
        for package in ("permllm_vllm", "permllm_offline")
        for path in (base / package).rglob("*.py")
    }
    assert {name for name in found if name.endswith(".py")} == modules
    assert {"permllm_vllm/py.typed", "permllm_offline/py.typed"} <= found
    assert "permllm_offline/report/page.html.jinja" in found
    assert "-py3-none-linux_" in distributions.wheel.name


def test_the_wheel_registers_command_and_plugin(distributions: Distributions) -> None:
    with ZipFile(distributions.wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(file).decode())
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        assert "\nRequires-Dist: torch>=" in archive.read(file).decode()
    assert entries["console_scripts"]["permllm-offline"] == "permllm_offline.__main__:main"
    assert entries["vllm.general_plugins"]["permllm"] == "permllm_vllm.plugin:register"


def test_the_source_distribution_can_build_and_test(distributions: Distributions) -> None:
    with tarfile.open(distributions.sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "tests/checkpoint", "docs", "requirements", "permllm_vllm"):
        wanted = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".so")
        }
        assert wanted
        assert wanted <= found, folder
    assert not [name for name in found if name.endswith((".so", ".pyc"))]
    assert not found & set(STALE)


def test_the_operator_runs_without_a_compiler(installed: Path, tmp_path: Path) -> None:
    shapes = (ROOT / "benchmarks" / "shapes.py").read_text()
    (tmp_path / "benchmarks_shapes.py").write_text(shapes)
    (tmp_path / "multiply.py").write_text(MULTIPLY)
    lines = run_installed(installed, "multiply.py", cwd=tmp_path).stdout.splitlines()
    assert Path(lines[0]).is_relative_to(installed)
    assert lines[1] == "cpu"
    assert float(lines[2]) < 1e-2


def test_the_command_runs_without_a_compiler(
    installed: Path, tmp_path: Path, tiny_model_directory: Path
) -> None:
    command = installed / "bin" / "permllm-offline"
    sparse = tmp_path / "sparse"
    method = ("--method", "magnitude")
    run_installed(
        *(installed, command, "prune", tiny_model_directory, "--output", sparse, *method),
        cwd=tmp_path,
    )
    done = run_installed(installed, command, "inspect", sparse, "--verify", cwd=tmp_path)
    assert "valid, checksums agree" in done.stdout


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_finds_the_installed_plugin(installed: Path, tmp_path: Path) -> None:
    lines = run_installed(installed, "-c", FIND_PLUGIN, cwd=tmp_path).stdout.splitlines()
    name, file = lines[-1].split()
    assert name == "PermLLMConfig"
    assert Path(file).is_relative_to(installed)


def test_without_a_compiler_the_wheel_is_pure(distributions: Distributions, tmp_path: Path) -> None:
    output = tmp_path / "pure"
    wheel = build("wheel", distributions.sources, output, PERMLLM_BUILD_CPU="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in names(wheel) if name.endswith(".so")]
    install(wheel, tmp_path / "environment")
    script = (
        "import torch; from permllm_vllm.backends import select_backend\n"
        "print(select_backend(torch.device('cpu'), torch.bfloat16).name)"
    )
    done = run_installed(tmp_path / "environment", "-c", script, cwd=tmp_path)
    assert done.stdout.strip() == "reference"
