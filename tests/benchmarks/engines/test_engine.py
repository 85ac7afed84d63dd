"""What is read off a vLLM engine."""

import os
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.engines import engine
from benchmarks.engines.engine import (
    ASKED,
    CACHE_ROOT,
    ENVIRONMENT,
    Answers,
    Engine,
    EngineError,
    Step,
    _output_to,
    reason,
    threads,
)
from benchmarks.engines.kv_cache import KV_CACHE
from benchmarks.engines.packed_bytes import head_bytes, sparse_bytes
from permllm_vllm.backends import PackedWeights
from permllm_vllm.quantization.head import COPY
from permllm_vllm.quantization.linear import PermLLMLinearMethod


def test_decoding_is_timed_while_all_sequences_decode() -> None:
    steps = [
        Step(1.0, {"a": 1}, False),
        Step(2.0, {"a": 2, "b": 1}, False),
        Step(2.5, {"a": 3, "b": 2}, False),
        Step(3.0, {"a": 4, "b": 3}, True),
        Step(9.0, {"a": 4, "b": 4}, True),
    ]
    found = Answers.of(steps, 2)
    assert (found.first_token_seconds, found.decode_tokens_per_second) == (2.0, 4.0)
    assert found.tokens_per_step == 1
    alone = Answers.of([Step(1.0, {"a": 1}, False), Step(1.5, {"a": 2}, True)], 1)
    assert (alone.first_token_seconds, alone.decode_tokens_per_second) == (1.0, 2.0)
    drafted = [Step(1.0, {"a": 1}, False), Step(2.0, {"a": 4}, False), Step(3.0, {"a": 6}, True)]
    found = Answers.of(drafted, 1)
    assert (found.decode_tokens_per_second, found.tokens_per_step) == (2.5, 2.5)


@pytest.mark.parametrize(
    "steps",
    [
        [],
        [Step(1.0, {"a": 1}, False), Step(2.0, {"a": 2}, True), Step(3.0, {"a": 2, "b": 1}, False)],
        [Step(1.0, {"a": 1, "b": 1}, True)],
    ],
    ids=["none", "queued", "one token"],
)
def test_sequences_that_do_not_decode_together_are_refused(
    steps: list[Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KV_CACHE, "3")
    with pytest.raises(EngineError, match=r"ended before all of them decoded.*more than 3 GiB"):
        Answers.of(steps, 2)


LOG = """\
(EngineCore pid=7) ERROR 11-25 23:01:02 [core.py:1] EngineCore failed to start.
(Worker pid=8) ERROR 11-25 [x.py:2] ValueError: no kernel: weights of 4 bits
(EngineCore pid=7) Exception: WorkerProc initialization failed due to an exception
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_reason_is_the_last_error_that_says_why() -> None:
    error = RuntimeError("Engine core initialization failed. See root cause above.")
    assert reason(LOG, error) == "ValueError: no kernel: weights of 4 bits"
    assert reason("torch.OutOfMemoryError: 2 GiB\n", error) == "OutOfMemoryError: 2 GiB"
    assert len(reason(f"ValueError: {'x ' * 1000}", error)) == 400
    assert reason("all is well", error) == f"RuntimeError: {error}"


def test_sparse_layers_are_counted() -> None:
    def layer(method: type, **tensors: torch.Tensor) -> Any:
        made: Any = torch.nn.Module()
        made.quant_method = object.__new__(method)
        made.input_size, made.output_size = 8, 6
        for name, tensor in tensors.items():
            made.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        return made

    packed = torch.zeros(50, dtype=torch.uint8)
    sparse = layer(
        PermLLMLinearMethod, weight_packed=packed, weight_scale=torch.zeros(6), bias=torch.zeros(6)
    )
    dense = layer(object, weight=torch.zeros(6, 8))
    model = torch.nn.Sequential(sparse, dense, layer(PermLLMLinearMethod, weight_packed=packed))
    assert sparse_bytes(model) == (50 + 24 + 50, 2 * 2 * 6 * 8)
    assert sparse_bytes(dense) == (0, 0)
    assert head_bytes(model) == (0, 0)
    dense.__dict__[COPY] = None
    assert head_bytes(model) == (0, 0)
    dense.__dict__[COPY] = PackedWeights(torch.zeros(72, dtype=torch.uint8))
    assert head_bytes(model) == (72, 4 * 6 * 8)


events: list[tuple[str, str]] = []
started_with: dict[str, str] = {}


class PretendedLLM:
    """In the place of vLLM's: loads nothing."""

    llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=lambda: None))

    def __init__(self, model: str, **options: Any) -> None:
        events.append(("load", Path(model).name))
        started_with.update(os.environ)

    def collective_rpc(self, function: Any) -> list[int]:
        return [2]

    def apply_model(self, function: Any) -> list[tuple[int, int]]:
        return [(9, 16)]


def test_a_checkpoint_is_read_before_its_loading_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the first engine reads from a disk, and the later ones from memory."""
    monkeypatch.setenv(KV_CACHE, "5")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=PretendedLLM))
    (tmp_path / "nested").mkdir()
    for path in ("config.json", "nested/model.safetensors"):
        (tmp_path / path).write_bytes(bytes(3))
    opened = Path.open

    def logged(path: Path, *arguments: Any, **options: Any) -> Any:
        events.append(("read", path.name))
        return opened(path, *arguments, **options)

    def clock() -> float:
        events.append(("clock", ""))
        return float(len(events))

    monkeypatch.setattr(Path, "open", logged)
    monkeypatch.setattr(engine.time, "perf_counter", clock)
    events.clear()
    with closing(Engine(tmp_path, eager=True)) as started:
        assert events == [
            ("read", "config.json"),
            ("read", "model.safetensors"),
            ("clock", ""),
            ("load", tmp_path.name),
            ("clock", ""),
        ]
        assert started.facts()["load_seconds"] == 2.0
    assert os.environ[KV_CACHE] == "5"  # vLLM reads it: what a user asked for stands


def test_the_reason_says_that_memory_was_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=PretendedLLM))
    with closing(Engine(tmp_path, eager=True)) as started:
        started._watch.close()  # it looks no more by itself
        started._watch.least_left_mib = 4096.0
        assert started._reason(ValueError("gone")) == "ValueError: gone"
        started._watch.least_left_mib = 30.0
        full = "ValueError: gone (the machine had 30 MiB of memory left)"
        assert started._reason(ValueError("gone")) == full


def test_an_engine_leaves_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a server that is started later inherits that its log is silent."""
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=PretendedLLM))
    before = dict(os.environ)
    with closing(Engine(tmp_path, eager=True)) as started:
        started.of_worker(threads)
    assert dict(os.environ) == before
    assert started_with.items() >= (ENVIRONMENT | ASKED).items()


def test_what_was_compiled_before_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the time to load depends on what ran before."""
    roots: list[str | None] = []

    class Compiled(PretendedLLM):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            roots.append(os.environ.get(CACHE_ROOT))
            if not options["enforce_eager"]:
                assert not any(Path(os.environ[CACHE_ROOT]).iterdir())
                (Path(os.environ[CACHE_ROOT]) / "compiled").touch()

    monkeypatch.setenv(CACHE_ROOT, "of the user")
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=Compiled))
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        with closing(Engine(tmp_path, eager=False)) as started:
            assert started.facts()["checkpoint"]["name"] == tmp_path.name
    Engine(tmp_path, eager=True).close()
    assert roots[2] == os.environ[CACHE_ROOT] == "of the user"
    assert len(set(roots)) == 3
    assert not any(Path(str(root)).exists() for root in roots)


def test_what_processes_write_goes_to_the_log() -> None:
    with tempfile.TemporaryFile() as log:
        with _output_to(log):
            os.system("echo out; echo err >&2")
        log.seek(0)
        assert sorted(log.read().split()) == [b"err", b"out"]
