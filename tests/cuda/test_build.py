"""When and for what the CUDA library is built."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools import Distribution

from csrc.cuda import architectures, build, toolkit
from tests.sanitizing.build import setup_module

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for name in ("PERMLLM_BUILD_CUDA", "PERMLLM_CUDA_ARCHS", "PERMLLM_CUTLASS_DIR", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(architectures, "capabilities", list)


@pytest.fixture
def tools(monkeypatch, tmp_path):
    monkeypatch.setattr(toolkit, "nvcc", lambda: "/opt/cuda/bin/nvcc")
    monkeypatch.setattr(toolkit, "nvcc_version", lambda: (13, 0))
    monkeypatch.setattr(toolkit, "library_directories", lambda: [tmp_path])
    monkeypatch.setattr(toolkit, "cutlass", lambda: tmp_path)


@pytest.mark.parametrize(
    ("chosen", "names"),
    [
        ("", ["80", "90a", "100", "120"]),
        ("8.0", ["80"]),
        ("90", ["90a"]),
        ("120, 9.0 80", ["80", "90a", "120"]),
        ("90a;90", ["90a"]),
        ("100a 100", ["100", "100a"]),
        ("10.0f,8.0", ["80", "100f"]),
    ],
)
def test_architectures(monkeypatch, chosen, names):
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", chosen)
    assert architectures.architectures() == names


@pytest.mark.parametrize("chosen", ["75", "sm_80", "hopper"])
def test_unknown_architectures(monkeypatch, chosen):
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", chosen)
    with pytest.raises(ValueError, match=f"names '{chosen}'.*80 90a 100 120"):
        architectures.architectures()


@pytest.mark.parametrize(
    ("capabilities", "names"),
    [
        ("9.0 9.0", ["90a"]),
        ("8.9", ["80"]),
        ("12.0 8.6", ["80", "120"]),
        ("10.3", ["100"]),
        ("11.0", ["110"]),  # no other runs there
        ("7.5 8.0", ["80"]),
        ("7.5", ["80", "90a", "100", "120"]),  # runs none: as where there is no GPU
        ("", ["80", "90a", "100", "120"]),
    ],
)
def test_architectures_of_the_gpus_here(monkeypatch, capabilities, names):
    monkeypatch.setattr(architectures, "capabilities", capabilities.split)
    assert architectures.architectures() == names
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", "100f")
    assert architectures.architectures() == ["100f"]


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("echo 9.0; echo 8.9; echo 9.0", ["8.9", "9.0"]),
        ("echo '[N/A]'", []),
        ("echo NVIDIA-SMI has failed; exit 9", []),
        (None, []),
    ],
)
def test_gpus_are_asked_of_nvidia_smi(monkeypatch, tmp_path, said, found):
    monkeypatch.undo()  # of _no_environment
    if said is not None:
        program = tmp_path / "nvidia-smi"
        query = "--query-gpu=compute_cap --format=csv,noheader"
        program.write_text(f'#!/bin/sh\n[ "$*" = "{query}" ] || exit 2\n{said}\n')
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    architectures.capabilities.cache_clear()
    try:
        assert architectures.capabilities() == found
    finally:
        architectures.capabilities.cache_clear()


def test_the_last_architecture_is_ptx_where_it_can_be():
    assert build.code_generation(["80", "90a"])[-1] == "arch=compute_90a,code=sm_90a"
    assert build.code_generation(["80", "120"])[-1] == "arch=compute_120,code=compute_120"


@pytest.mark.parametrize("names", ["80 90a 100 120", "80 120"])
def test_the_gemm_of_cutlass_is_built_for_hopper_alone(monkeypatch, tmp_path, names):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", names)
    monkeypatch.setattr(toolkit, "cutlass", lambda: tmp_path)
    lines, linked = {}, []

    def compile_source(line, target):
        lines[target.name] = line

    build.build(compile_source, linked.append, ["c++"], [], tmp_path, tmp_path, tmp_path / "all.so")
    ours = "-".join(names.split())
    assert {name for name in lines if not name.startswith("gemm")} == {
        f"{stem}.{ours}.o" for stem in ("bindings", "device", "mma_linear", "permute")
    }
    gemms = {name: line for name, line in lines.items() if f"{tmp_path}/include" in line}
    assert set(gemms) == ({"gemm_sm90.90a.o"} if "90a" in names else set())
    assert all("arch=compute_90a,code=sm_90a" in line for line in gemms.values())
    defined = "-DPERMLLM_SM90" in lines[f"bindings.{ours}.o"]
    assert defined == ("90a" in names)
    assert sum(argument.endswith(".o") for argument in linked[0]) == len(lines)


@pytest.mark.parametrize("most", ["0", "-2", "many"])
def test_max_jobs_is_a_number(monkeypatch, most):
    assert build.jobs() == 2
    monkeypatch.setenv("MAX_JOBS", most)
    with pytest.raises(ValueError, match=f"MAX_JOBS is '{most}': it must be a positive number"):
        build.jobs()
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("wish", ["", "1"])
@pytest.mark.parametrize("capabilities", [[], ["9.0"]])
def test_builds_where_nvcc_is(monkeypatch, wish, capabilities):
    """With a GPU and without, as on the node of a cluster where software is installed."""
    monkeypatch.setattr(architectures, "capabilities", lambda: capabilities)
    monkeypatch.setenv("PERMLLM_BUILD_CUDA", wish)
    assert build.reason_not_to_build() is None
    monkeypatch.setenv("PERMLLM_BUILD_CUDA", "0")
    assert "unset it" in build.reason_not_to_build()


@pytest.mark.usefixtures("tools")
def test_missing_tools_are_errors_only_where_a_build_is_demanded(monkeypatch):
    for tool, answer, said in (
        ("library_directories", [], "libcudart_static.a was not found"),
        ("nvcc_version", (12, 4), "/opt/cuda/bin/nvcc is older than CUDA 12.8"),
        ("nvcc", None, "nvcc was not found"),
    ):
        monkeypatch.delenv("PERMLLM_BUILD_CUDA", raising=False)
        monkeypatch.setattr(toolkit, tool, lambda answer=answer: answer)
        assert build.reason_not_to_build().startswith(said)
        monkeypatch.setenv("PERMLLM_BUILD_CUDA", "1")
        with pytest.raises(RuntimeError, match=f"PERMLLM_BUILD_CUDA=1 is set, but {said}"):
            build.reason_not_to_build()


@pytest.mark.usefixtures("tools")
def test_cutlass_is_needed_for_hopper_alone(monkeypatch):
    monkeypatch.setattr(toolkit, "cutlass", lambda: None)
    assert "the CUTLASS headers were not found: pip install" in build.reason_not_to_build()
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", "80 100")
    assert build.reason_not_to_build() is None


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(
    ("wish", "names", "capabilities", "said"),
    [
        ("", "", [], "nvcc (it was found), for 80 90a 100 120 (no such GPU is here: all)"),
        ("", "", ["9.0"], "nvcc (it was found), for 90a (what the GPUs here run)"),
        ("1", "80", [], "(PERMLLM_BUILD_CUDA=1 is set), for 80 (PERMLLM_CUDA_ARCHS is set)"),
    ],
)
def test_a_build_is_announced(monkeypatch, wish, names, capabilities, said):
    """What, why, that it takes a while, and how to do without."""
    monkeypatch.setattr(architectures, "capabilities", lambda: capabilities)
    monkeypatch.setenv("PERMLLM_BUILD_CUDA", wish)
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", names)
    line = build.announcement()
    assert said in line
    assert "This takes minutes: PERMLLM_BUILD_CUDA=0 leaves them out" in line
    assert "\n" not in line


def test_setup_announces_the_build(monkeypatch, capsys, tmp_path):
    setup = setup_module()
    capsys.readouterr()  # what it lacks here
    order = []
    pretended = SimpleNamespace(
        announcement=lambda: order.append("announced") or "compiling the CUDA kernels",
        build=lambda **_: order.append("built"),
    )
    monkeypatch.setattr(setup, "cuda_build", lambda: pretended)
    monkeypatch.setattr(setup, "compiler", lambda: ["c++"])
    setup.BuildLibrary(Distribution()).build_cuda(tmp_path / "_C_cuda.so")
    assert capsys.readouterr().err == "compiling the CUDA kernels\n"
    assert order == ["announced", "built"]


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("Cuda compilation tools, release 12.4, V12.4.131", (12, 4)),
        ("Cuda compilation tools, release 13.0, V13.0.88", (13, 0)),
        ("something else", (12, 8)),  # not known: the build will tell
    ],
)
def test_the_version_of_nvcc(monkeypatch, tmp_path, said, version):
    compiler = tmp_path / "nvcc"
    compiler.write_text(f"#!/bin/sh\necho '{said}'\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(toolkit, "nvcc", lambda: str(compiler))
    assert toolkit.nvcc_version() == version


def test_nvcc_of_a_python_package_is_not_looked_for(monkeypatch, tmp_path):
    """Tests may need its headers: that is no wish to build. CUDA_HOME says where it is."""
    package = tmp_path / "site-packages" / "nvidia" / "cu13"
    (package / "bin").mkdir(parents=True)
    (package / "bin" / "nvcc").touch()
    for name in ("CUDA_HOME", "CUDA_PATH", "PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    assert toolkit.nvcc() in (None, "/usr/local/cuda/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(package))
    assert toolkit.nvcc() == str(package / "bin" / "nvcc")


def test_make_install_compiles_no_cuda(tmp_path):
    """Its vLLM is the one for the CPU, and nvcc may be there for the tests."""
    make = shutil.which("make")
    if make is None:
        pytest.skip("needs make")
    command = [make, "--dry-run", "--always-make", "install", f"VENV={tmp_path}"]
    planned = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    (install,) = [line for line in planned.stdout.splitlines() if "--editable" in line]
    assert install.startswith("PERMLLM_BUILD_CUDA=${PERMLLM_BUILD_CUDA:-0} ")


@pytest.mark.usefixtures("tools")
def test_what_every_library_needs_is_missing(monkeypatch):
    assert build.reason_not_to_build("no compiler; install one") == "no compiler; install one"
    monkeypatch.setenv("PERMLLM_BUILD_CUDA", "1")
    with pytest.raises(RuntimeError, match="PERMLLM_BUILD_CUDA=1 is set, but no compiler"):
        build.reason_not_to_build("no compiler; install one")


def test_a_demanded_build_fails_where_there_is_no_compiler(tmp_path):
    """In setup.py itself: without the demand it warns, and the package is pure Python."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}
    environment["PATH"] = str(tmp_path)
    command = [sys.executable, "setup.py", "--name"]

    def configure(**changes):
        return subprocess.run(
            command, cwd=ROOT, env=environment | changes, capture_output=True, text=True
        )

    warned = configure()
    assert warned.returncode == 0, warned.stderr
    assert "without its CPU kernels: no C++ compiler was found" in warned.stderr
    demanded = configure(PERMLLM_BUILD_CUDA="1")
    assert demanded.returncode != 0
    assert "PERMLLM_BUILD_CUDA=1 is set, but no C++ compiler was found" in demanded.stderr


def test_cutlass_is_checked_for_its_version(monkeypatch, tmp_path):
    header = tmp_path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    monkeypatch.setenv("PERMLLM_CUTLASS_DIR", str(tmp_path))
    for minor, found in ((1, None), (2, tmp_path)):
        header.write_text(f"#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR {minor}\n")
        assert toolkit.cutlass() == found
    assert str(tmp_path) in toolkit.cutlass_missing()


def test_the_toolkit_is_where_nvcc_is(monkeypatch, tmp_path):
    for file in ("bin/nvcc", "include/cuda_runtime_api.h", "lib64/libcudart_static.a"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert toolkit.nvcc() == str(tmp_path / "bin" / "nvcc")
    assert toolkit.home() == tmp_path
    assert toolkit.library_directories() == [tmp_path / "lib64"]
