"""llama.cpp's benchmark as an engine: what it is asked, and what is read off its answer."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import serving
from benchmarks.engines import engine as engines
from benchmarks.engines import llama_cpp
from benchmarks.engines.engine import Answers, EngineError
from benchmarks.engines.gguf_twin import gguf_twin
from benchmarks.engines.llama_cpp import LlamaCpp, program, threads_beside_vllm
from tests.offline.tiny_models import tiny_model

# Says what it was asked beside what is always the same, and copies a model in place of rounding it.
PROGRAM = f"""#!{sys.executable}
import json, shutil, sys
if "--version" in sys.argv:
    print("version: 7 (abc)", file=sys.stderr)
elif sys.argv[0].endswith("quantize"):
    shutil.copy(*sys.argv[1:3])
else:
    asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
    if asked["-npl"] == "13":
        sys.exit("no room")
    print("warming up")
    print(json.dumps({{"t_pp": 0.25, "speed_tg": 40.0, "asked": asked}}))
    json.dump(asked, open(sys.argv[0] + ".asked", "w"))
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in llama_cpp.PROGRAMS:
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    monkeypatch.setattr(llama_cpp, "SETTLING_SECONDS", 0)
    return folder


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_batch_is_asked_for_and_timed(programs: Path, dense: Path) -> None:
    model = gguf_twin(dense, "Q8_0", programs / "llama-quantize")
    engine = LlamaCpp(programs / llama_cpp.BENCH, model, threads=3)
    assert engine.answers(4, 32, 16) == Answers(0.25, 40.0)
    asked = json.loads((programs / f"{llama_cpp.BENCH}.asked").read_text())
    assert asked.items() >= {"-npp": "32", "-ntg": "16", "-npl": "4"}.items()
    assert asked["--threads"] == asked["--threads-batch"] == "3"
    assert int(asked["--ctx-size"]) >= 4 * (32 + 16)
    assert asked["--model"] == str(model / "model.gguf")
    facts = engine.facts()
    assert facts["llama_cpp"] == "7 (abc)"
    assert facts["threads"] == 3
    assert facts["peak_mib"] > 1  # of a Python
    assert facts["packed_ratio"] == facts["head_ratio"] == 1  # a copy, so in 16 bits
    assert facts["checkpoint"]["name"] == "model-gguf-q8_0"


def test_what_fails_is_refused_with_its_words(programs: Path, dense: Path) -> None:
    model = gguf_twin(dense, "BF16", programs / "llama-quantize")
    engine = LlamaCpp(programs / llama_cpp.BENCH, model, threads=1)
    with pytest.raises(EngineError, match=r"^llama-batched-bench ended with status 1: no room$"):
        engine.answers(13, 32, 16)
    limited = LlamaCpp(programs / llama_cpp.BENCH, model, threads=1, memory_limit=0.001)
    with pytest.raises(EngineError, match=r"^\d+ MiB are more than 0.001 GiB$"):
        limited.answers(1, 32, 16)


def test_threads_are_those_of_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp.os, "sched_getaffinity", lambda process: set(range(6)))
    monkeypatch.delenv(engines.RESERVED_CORES, raising=False)
    assert threads_beside_vllm() == 5
    monkeypatch.setenv(engines.RESERVED_CORES, "0")
    assert threads_beside_vllm() == 6


def test_missing_programs_are_told_with_a_remedy(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program(llama_cpp.BENCH, programs) == programs / llama_cpp.BENCH
    monkeypatch.setenv("PATH", str(programs))
    assert program(llama_cpp.QUANTIZE, None) == programs / llama_cpp.QUANTIZE
    with pytest.raises(FileNotFoundError, match=r"was not found in .*/none: build llama\.cpp"):
        program(llama_cpp.BENCH, programs / "none")


def test_the_command_runs_it_beside_vllm_s_engines(
    programs: Path,
    dense: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(serving, "random_model", lambda name: dense)
    words = ["serving", "--variants", "llama.cpp Q4_0", "--cells", "1x32", "--json"]
    monkeypatch.setattr(sys, "argv", [*words, str(tmp_path / "out.json"), "--llama-cpp", "/none"])
    with pytest.raises(SystemExit):
        serving.main()
    assert "llama-batched-bench was not found in /none" in capsys.readouterr().err
    words += [str(tmp_path / "out.json"), "--llama-cpp", str(programs)]
    monkeypatch.setattr(sys, "argv", words)
    serving.main()
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert (row["variant"], row["decode_tokens_per_second"]) == ("llama.cpp Q4_0", 40.0)
    assert row["time_to_first_token_ms"] == 250
