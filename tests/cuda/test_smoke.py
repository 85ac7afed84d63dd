"""What is tried of every kernel before the tests, and how it is told what fails; without a GPU."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda import experts_on_gpu, on_gpu, smoke, smoke_cases
from tests.cuda.emulated import H100, Gpu
from tests.cuda.smoke_cases import CASES, EXPERTS, PRODUCTS, Product

ROOT = Path(__file__).parents[2]
PCIE = Gpu(90, 114, 227 << 10, 228 << 10)
B200 = Gpu(100, 148, 227 << 10, 228 << 10)


@pytest.mark.parametrize("case", PRODUCTS, ids=lambda case: case.name)
@pytest.mark.parametrize("gpu", [H100, PCIE], ids=["SXM", "PCIe"])
def test_a_shape_reaches_its_kernel(emulator, case, gpu):
    gpu = B200 if case.kernel.endswith("sm100") else gpu
    shape = case.rows, case.inputs, case.tokens
    options = {"gpu": gpu, "int8": case.int8}
    kernel, tile = emulator.choice(*shape, **options, permuted=case.permuted, built="sm90 sm100")
    if kernel == "few_tokens":
        plan = emulator.plan(*shape, **options, permuted=case.permuted)
        assert not emulator.takes_a_pass(*shape, **options)
        assert (plan.splits > 1) == case.split
        tile = plan.rows
    assert (kernel, tile) == (case.kernel, case.tile)


def test_every_kernel_and_tile_is_tried():
    few = {(case.tile, case.tokens, case.split) for case in PRODUCTS if case.kernel == "few_tokens"}
    wide = {(rows, 64, split) for rows in (128, 192, 256) for split in (False, True)}
    assert few == {(128, 8, False), (128, 8, True), (128, 200, True)} | wide
    many = {(case.kernel, case.tile) for case in PRODUCTS if case.kernel != "few_tokens"}
    assert many == {
        ("many_tokens_mma", 128),
        *(("many_tokens_sm90", tile) for tile in (64, 128, 256)),
        *(("many_tokens_sm90_permuting", tile) for tile in (32, 64)),
        *(("many_tokens_sm100", tile) for tile in (64, 128, 256)),
    }
    assert {case.int8 for case in PRODUCTS if case.kernel == "many_tokens_mma"} == {False, True}
    assert len({case.name for case in CASES}) == len(CASES)


def test_the_first_of_each_kernel_comes_first():
    kernels = [case.kernel for case in CASES]
    assert {*kernels} == {*kernels[: len({*kernels})]}
    assert sorted(case.name for case in (*PRODUCTS, *EXPERTS)) == sorted(
        case.name for case in CASES if case.kernel != "permute"
    )


def test_experts_have_few_pairs_and_many():
    """64 of each on average make many (csrc/cuda/experts.h)."""
    averages = {case.kernel: case.tokens * 2 / case.experts for case in EXPERTS}
    assert averages["few_pairs"] < 64 <= averages["many_pairs"]


@dataclass(frozen=True)
class Pretended:
    """Runs `body`, without a GPU."""

    name: str
    body: object

    def skipped(self, capability):
        return "not here" if self.body is None else ""

    def run(self):
        self.body()


def wrong():
    raise AssertionError("relative error 1.0\nand more")


@pytest.mark.parametrize(
    ("capability", "built", "kernel", "reason"),
    [
        ((9, 0), "90", "many_tokens_sm90", ""),
        ((9, 0), "", "many_tokens_sm90_permuting", "this build lacks it"),
        ((8, 0), "90", "many_tokens_sm90", "of compute capability 9.0 alone"),
        ((9, 0), "90 100", "many_tokens_sm100", "of compute capability 10.0 alone"),
        ((10, 0), "100", "many_tokens_sm100", ""),
        ((12, 0), "", "many_tokens_mma", ""),
    ],
)
def test_what_a_gpu_does_not_run_is_skipped(monkeypatch, capability, built, kernel, reason):
    library = type("Library", (), {"cutlass_architectures": staticmethod(lambda: built)})
    monkeypatch.setattr(torch.ops, "permllm", library)
    assert Product(kernel, 64, 8, 128, 100).skipped(capability) == reason


def test_what_is_skipped_starts_no_process(monkeypatch):
    """Which would take as long to start as one that multiplies."""
    monkeypatch.setattr(smoke, "attempt", None)
    (trial,) = smoke.run([Pretended("elsewhere", None)], 60, None, (9, 0))
    assert (trial.outcome, trial.seconds) == ("skipped: not here", 0.0)


@pytest.mark.parametrize(
    ("tells", "found"),
    [(lambda: (9, 0), (9, 0)), (wrong, None), (lambda: time.sleep(60), None)],
)
def test_a_process_of_its_own_asks_the_gpu(monkeypatch, capfd, tells, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", tells)
    assert smoke.capability(5.0 if found or tells is wrong else 0.5) == found


def test_where_the_gpu_does_not_say_what_it_is_everything_is_tried():
    (trial,) = smoke.run([Pretended("elsewhere", None)], 60, None, None)
    assert trial.failed


def test_how_each_ends_is_told(tmp_path):
    """Each in a process of its own, which may do to itself what it likes."""
    cases = [
        Pretended("right", lambda: None),
        Pretended("wrong", wrong),
        Pretended("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
        Pretended("exits", lambda: os._exit(7)),
        Pretended("elsewhere", None),
    ]
    file = tmp_path / "smoke.json"
    trials = smoke.run(cases, 60, file, (9, 0))
    assert [trial.outcome for trial in trials] == [
        "passed", "failed: AssertionError: relative error 1.0", "failed: exit status -11",
        "failed: exit status 7", "skipped: not here",
    ]  # fmt: skip
    assert [trial.failed for trial in trials] == [False, True, True, True, False]
    written = json.loads(file.read_text())["kernels"]
    assert [trial["name"] for trial in written] == [case.name for case in cases]
    assert written[1]["again"] == dict.fromkeys(smoke.AGAIN, trials[1].outcome)


@pytest.mark.parametrize("setting", smoke.AGAIN)
def test_what_fails_is_tried_again_with_each_setting_alone(capsys, setting):
    name, _, value = setting.partition("=")
    others = [other.partition("=")[0] for other in smoke.AGAIN if other != setting]

    def overlaps():
        assert os.environ.get(name) == value
        assert not any(other in os.environ for other in others)

    (trial,) = smoke.run([Pretended("overlaps", overlaps)], 60, None)
    assert trial.failed
    assert [trial.again[tried] == "passed" for tried in smoke.AGAIN] == [
        tried == setting for tried in smoke.AGAIN
    ]
    assert f"with {setting} passed" in capsys.readouterr().out
    assert name not in os.environ


def test_what_hangs_is_stopped_and_named(monkeypatch, capfd):
    monkeypatch.setattr(smoke, "LIMIT", 1.5)
    monkeypatch.setattr(smoke, "AGAIN", ())
    start = time.monotonic()
    hangs, right = Pretended("hangs", lambda: time.sleep(60)), Pretended("right", lambda: None)
    first, second = smoke.run([hangs, right], 60, None)
    assert time.monotonic() - start < 30
    assert first.outcome == "failed: it hangs, and was stopped after 2 s"
    assert second.outcome == "passed"
    assert "in <lambda>" in capfd.readouterr().err  # where it was


def test_what_no_time_was_left_for_is_said():
    (trial,) = smoke.run([Pretended("right", lambda: None)], 0, None)
    assert trial.failed
    assert trial.outcome == "not run: no time was left"
    assert not trial.again


def test_without_the_library_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(smoke.ops, "cuda_missing_reason", "_C_cuda.so was not built: install it")
    monkeypatch.setattr(smoke, "run", None)
    monkeypatch.setattr(sys, "argv", ["smoke"])
    with pytest.raises(SystemExit, match="was not built: install it"):
        smoke.main()


UNTOUCHED = """
import torch

def touched(*_):
    raise AssertionError("a GPU that a process touches, those forked from it cannot")

for name in ("_lazy_init", "is_available", "device_count", "current_device"):
    setattr(torch.cuda, name, touched)
torch._C._cuda_getDeviceCount = touched
import tests.cuda.smoke
"""


def test_what_is_forked_has_not_touched_the_gpu():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", UNTOUCHED], cwd=ROOT, env=environment, check=True)


def with_a_mistake(y):
    y[-1, -1] += 1
    return y


@pytest.mark.parametrize("change", [lambda y: y, with_a_mistake], ids=["right", "wrong"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_finds_one_wrong_result(monkeypatch, case, change):
    """On the CPU, with results of PyTorch."""
    for module in (smoke_cases, on_gpu, experts_on_gpu):
        monkeypatch.setattr(module, "CUDA", torch.device("cpu"))
    for layer in (on_gpu.OnGpu, experts_on_gpu.Experts):
        monkeypatch.setattr(layer, "__call__", lambda self, *x: change(self.exact(*x).bfloat16()))

    def permute(x, places):
        return change(x.view(len(x), -1, 128).gather(2, places.long().view(1, -1, 128).expand(
            len(x), -1, -1)).flatten(1))  # fmt: skip

    library = type("Library", (), {"permute_inputs": staticmethod(permute)})
    monkeypatch.setattr(torch.ops, "permllm", library)
    torch.manual_seed(0)
    if change is with_a_mistake:
        with pytest.raises(AssertionError):
            case.run()
    else:
        case.run()
