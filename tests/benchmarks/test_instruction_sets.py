"""What lesser instruction sets are held against."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import instruction_sets
from benchmarks.cpu import contestants
from benchmarks.instruction_sets import FLOAT32, LIMITS, TORCH, VLLM, Row, limited, measure, table
from benchmarks.records import machine
from permllm_vllm.backends.cpu import INT8_ONLY

RESULTS = Path(instruction_sets.__file__).parent / "results"
NEW = {"n": 8, "k": 64, "m": 1, "pattern": "2:4", "value_dtype": "int8", "isa": "portable"}


@pytest.mark.parametrize("has_vllm", [False, True])
@pytest.mark.parametrize("fastest", [TORCH, FLOAT32, VLLM])
def test_the_ratio_that_counts_is_to_the_fastest_dense_contestant(
    has_vllm: bool, fastest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def median_times(found: dict[str, object], *_: object) -> dict[str, float]:
        dense = {name: 8.0 if name == fastest else 12.0 for name in (TORCH, FLOAT32, VLLM)}
        return {name: dense.get(name, 4.0 if name == "bfloat16" else 2.0) for name in found}

    make = instruction_sets._bfloat16_linear
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)
    monkeypatch.setattr(instruction_sets, "vllm_primitive", lambda _: make if has_vllm else None)
    monkeypatch.setattr(instruction_sets, "median_times", median_times)
    with torch.inference_mode():
        rows = measure((64, 64), [4], "2:4")
    best = 8.0 if has_vllm or fastest != VLLM else 12.0
    assert [(row.value_dtype, row.fastest_ratio) for row in rows] == [
        ("bfloat16", best / 4), ("int8", best / 2)
    ]  # fmt: skip
    for row in rows:
        assert row.fastest == (fastest if best == 8.0 else TORCH)
        assert row.ratio == row.peer_us / row.ours_us
        assert (row.vllm_us is not None) is has_vllm
    last = list(table(rows).columns[-1].cells)
    assert last == [f"{best / 4:.2f}x", f"{best / 2:.2f}x"]


@pytest.mark.parametrize("isa", [*INT8_ONLY, "avx2"])
def test_what_has_no_kernel_has_no_row(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa not in torch.ops.permllm.cpu_instruction_sets().split(","):
        pytest.skip(f"this CPU or build does not run {isa}")
    monkeypatch.setenv("PERMLLM_CPU_ISA", isa)
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)
    with torch.inference_mode():
        rows = measure((64, 64), [2], "2:4")
    assert [row.value_dtype for row in rows] == (
        ["int8"] if isa in INT8_ONLY else ["bfloat16", "int8"]
    )
    has_peer = contestants.has_vllm() and isa not in instruction_sets.WITHOUT_INT8_PEER
    assert all((row.vllm_int8_us is not None) is has_peer for row in rows)
    assert {row.isa for row in rows} == {isa}


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch is built without MKL")
def test_portable_holds_the_float32_product_of_mkl_to_sse2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MKL_VERBOSE", "1")
    code = "import torch; torch.nn.functional.linear(torch.ones(64, 256), torch.ones(256, 256))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=limited("portable"), capture_output=True, text=True)
    products = [line for line in done.stdout.splitlines() if "SGEMM(" in line]
    assert products, done.stderr
    assert all("CNR:COMPATIBLE" in line for line in products)


def test_a_limit_of_the_caller_holds_no_other_instruction_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert "MKL_CBWR" not in limited("avx2")
    assert limited("avx2")["MKL_ENABLE_INSTRUCTIONS"] == "AVX2"


@pytest.mark.parametrize(
    ("have", "measured"),
    [
        ("amx,avx512_bf16,zen5,avx512,portable", ["avx512_bf16", "avx512", "portable"]),
        ("zen5,avx512_bf16,avx512,avx2", ["avx512", "avx2"]),
        ("avx512_bf16,zen5,avx512", ["avx512"]),
        ("avx2,portable", ["portable"]),
    ],
)
def test_by_default_all_but_the_fastest_are_measured(
    have: str, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constants of a microarchitecture make no instruction set."""
    asked = []

    def run_limited(isa: str, _: list[str]) -> list[Any]:
        asked.append(isa)
        return []

    monkeypatch.setattr(torch.ops.permllm, "cpu_instruction_sets", lambda: have, raising=False)
    monkeypatch.setattr(instruction_sets, "run_limited", run_limited)
    monkeypatch.setattr(sys, "argv", [""])
    instruction_sets.main()
    assert asked == measured
    assert set(asked) <= set(LIMITS)


def test_the_result_says_what_held_the_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_limited(isa: str, _: list[str]) -> list[Any]:
        return []

    file = tmp_path / "result.json"
    monkeypatch.setattr(instruction_sets, "run_limited", run_limited)
    monkeypatch.setattr(sys, "argv", ["", "--isa", "portable", "--json", str(file)])
    instruction_sets.main()
    assert json.loads(file.read_text())["limits"] == LIMITS


@pytest.mark.parametrize("name", ["zen3", "zen4", "zen5", "amx"])
def test_a_committed_result_goes_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the limits of the sets that were measured then."""
    file = tmp_path / "result.json"
    file.write_text((RESULTS / f"instruction-sets-{name}.json").read_text())
    before = json.loads(file.read_text())
    new = Row(**{**dict.fromkeys(Row.__dataclass_fields__, 1.0), **NEW})  # type: ignore[arg-type]
    monkeypatch.setattr(machine, "machine", lambda: before["machine"])
    monkeypatch.setattr(machine, "versions", lambda: before["versions"])
    monkeypatch.setattr(instruction_sets, "run_limited", lambda *_: [new])
    options = ["--isa", "portable", "--shapes", "8x64", "--m", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["", *options])
    instruction_sets.main()
    after = json.loads(file.read_text())
    assert after["rows"][:-1] == before["rows"]
    assert after["rows"][-1]["n"] == 8
    assert after["limits"] == LIMITS


def test_a_set_that_fails_leaves_the_others_and_is_measured_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def row(isa: str) -> Row:
        more = {"value_dtype": "int8", "threads": 1, "peer": TORCH, "fastest": TORCH}
        times = dict.fromkeys(("peer_us", "float32_us", "ours_us", "ratio", "fastest_ratio"), 1.0)
        cell = {"n": 8, "k": 64, "m": 1, "pattern": "2:4", "isa": isa}
        return Row(**cell, **more, **times, vllm_us=None, vllm_int8_us=None)  # type: ignore[arg-type]

    def run(command: list[str], env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        isa = env["PERMLLM_CPU_ISA"]
        asked.append(isa)
        rows = json.dumps([asdict(row(isa))])
        return subprocess.CompletedProcess(command, -9 if isa in killed else 0, rows)

    asked: list[str] = []
    killed = {"avx2"}
    file = tmp_path / "result.json"
    options = ["--isa", "avx512", "avx2", "portable", "--shapes", "8x64", "--m", "1"]
    monkeypatch.setattr(instruction_sets, "subprocess", SimpleNamespace(run=run, PIPE=None))
    monkeypatch.setattr(sys, "argv", ["", *options, "--json", str(file)])
    with pytest.raises(SystemExit, match="measuring avx2 was killed by SIGKILL"):
        instruction_sets.main()
    rows = json.loads(file.read_text())["rows"]
    assert [row["isa"] for row in rows] == ["avx512", "portable"]
    assert all(row["load_average"] >= 0 for row in rows)
    killed.clear()
    instruction_sets.main()
    assert asked == ["avx512", "avx2", "portable", "avx2"]
    assert len(json.loads(file.read_text())["rows"]) == 3


def test_every_shape_is_measured_with_every_pattern(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def measure(shape: tuple[int, int], tokens: list[int], pattern: str) -> list[Any]:
        asked.append((shape, tokens, pattern))
        return []

    options = ["--shapes", "8x64", "16x64", "--patterns", "2:4", "4:8", "--m", "1"]
    passed = []

    def run_limited(isa: str, arguments: list[str]) -> list[Any]:
        passed.append(arguments)
        monkeypatch.setattr(sys, "argv", ["", "--here", *arguments])
        instruction_sets.main()
        return json.loads(capsys.readouterr().out)

    monkeypatch.setattr(instruction_sets, "measure", measure)
    monkeypatch.setattr(instruction_sets, "run_limited", run_limited)
    monkeypatch.setattr(sys, "argv", ["", "--isa", "avx2", *options])
    threads = torch.get_num_threads()
    instruction_sets.main()
    torch.set_num_threads(threads)
    assert passed == [options]
    assert asked == [
        (shape, [1], pattern) for shape in ((8, 64), (16, 64)) for pattern in ("2:4", "4:8")
    ]
