"""vLLM engines that take turns: whatever else the machine does falls on all of them."""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast
from unittest.mock import patch

import psutil
import torch

from benchmarks.cpu.conditions import conditions
from benchmarks.engines.identity import identity
from benchmarks.engines.kv_cache import KV_CACHE, kv_cache_environment, kv_cache_gib
from benchmarks.engines.memory_watch import MemoryWatch
from benchmarks.engines.packed_bytes import head_bytes, sparse_bytes
from benchmarks.engines.plugin_options import plugin_options
from benchmarks.records.rows import NOTHING

ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ASKED = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
"""Lets functions be sent to an engine's own processes, to ask them what they hold."""
RESERVED_CORES = "VLLM_CPU_NUM_OF_RESERVED_CPU"
"""vLLM's variable: cores that it leaves to its scheduler, one by default."""
CACHE_ROOT = "VLLM_CACHE_ROOT"
"""vLLM's variable: where it keeps what `torch.compile` has made."""
ENGINE_OPTIONS: Mapping[str, Any] = {
    "max_model_len": 1024,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}
WARM_UP_PROMPT = 32
READ_BYTES = 1 << 20
SETTLING_SECONDS = 1.5
"""vLLM's processes wait for work in a loop for a second, on the cores of all, before they sleep."""
RAISED = re.compile(r"^.*?\b((?:\w+\.)*\w*(?:Error|Exception|Exit)): (.+)$", re.MULTILINE)
NO_REASON = ("Engine core initialization failed", "WorkerProc initialization failed")
"""What vLLM says where the reason stands above."""
REASON_LENGTH = 400
Answer = TypeVar("Answer")


class EngineError(RuntimeError):
    """An engine did not start, or ended; the message is the reason."""


@dataclass(frozen=True)
class Step:
    """What has come back at some time: the tokens of each sequence, and whether one has ended."""

    seconds: float
    tokens: Mapping[str, int]
    ended: bool


@dataclass(frozen=True)
class Answers:
    """Times of a batch.

    Attributes:
        first_token_seconds: until every sequence had its first token.
        decode_tokens_per_second: of all sequences together, from then on until one ended, so that
            no prompt was read and none was missing.
        tokens_per_step: of a sequence in that time: more than one where a draft's were accepted.
    """

    first_token_seconds: float
    decode_tokens_per_second: float
    tokens_per_step: float = 1.0

    @classmethod
    def of(cls, steps: Iterable[Step], batch: int) -> "Answers":
        """Read the times off the steps.

        Raises:
            EngineError: a sequence ended before the last one had its first token.
        """
        first = last = None
        decoding = 0
        for step in steps:
            if first is None:
                first = step if len(step.tokens) == batch else None
            else:
                last = step
                decoding += 1
            if step.ended:
                break
        if first is None or last is None:
            raise EngineError(
                f"a sequence of {batch} ended before all of them decoded: take a smaller batch, "
                f"shorter prompts, or a KV cache that holds all, of more than {kv_cache_gib()} GiB "
                f"(--kv-cache, or {KV_CACHE})"
            )
        decoded = sum(last.tokens.values()) - sum(first.tokens.values())
        speed = decoded / (last.seconds - first.seconds)
        return cls(first.seconds, speed, decoded / decoding / batch)


class Running(Protocol):
    """What takes turns."""

    def answers(self, batch: int, prompt: int, output: int) -> Answers:
        """Times of a batch of answers; raises EngineError."""
        ...

    def facts(self) -> dict[str, Any]:
        """What a row says of the engine itself; raises EngineError."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Engine:
    """A vLLM engine in processes of its own that answers with a fixed number of tokens.

    Its checkpoint is read once before, so that no engine's load time is that of a disk. One that is
    compiled begins with an empty cache of vLLM's, so that its load time is not that of a reader of
    what an earlier run has compiled.

    Args:
        model: the checkpoint.
        eager: whether nothing is compiled.
        dtype: of the activations.
        memory_limit: GiB beyond which its processes are ended; see `MemoryWatch`.
        speculation: vLLM's ``--speculative-config``; None where nothing drafts.

    Raises:
        EngineError: it does not start.
    """

    def __init__(
        self,
        model: Path,
        *,
        eager: bool,
        dtype: str = "bfloat16",
        head: str = "dense",
        memory_limit: float | None = None,
        speculation: Mapping[str, Any] | None = None,
    ) -> None:
        with _environment():
            from vllm import LLM

        self._model = model
        read_once(model)
        self._watch = MemoryWatch(memory_limit, this_too=True)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the processes that write)
        self._compiled = None if eager else tempfile.TemporaryDirectory(prefix="permllm-compiled-")
        cache = {} if self._compiled is None else {CACHE_ROOT: self._compiled.name}
        start = time.perf_counter()
        try:
            with _environment(cache), _output_to(self._log):
                self._llm = LLM(
                    model=str(model),
                    enforce_eager=eager,
                    dtype=dtype,
                    additional_config=plugin_options(head),
                    speculative_config=None if speculation is None else dict(speculation),
                    **ENGINE_OPTIONS,
                )
        except Exception as error:
            self._watch.close()
            _end(self._watch.processes())
            self._forget()
            raise EngineError(self._reason(error)) from error
        self._load_seconds = time.perf_counter() - start
        self._watch.settle()
        self._threads = self.of_worker(threads)
        with _environment():
            ((self._packed, self._dense),) = self._llm.apply_model(sparse_bytes)

    def answers(self, batch: int, prompt: int, output: int) -> Answers:
        """Times of `batch` answers of exactly `output` tokens to prompts of `prompt` tokens."""
        words = ([3 + (7 * i + 13 * j) % 30000 for j in range(prompt)] for i in range(batch))
        return self.answers_to(list(words), output)

    def answers_to(self, prompts: Sequence[Sequence[int]], output: int) -> Answers:
        """Times of answers of exactly `output` tokens to prompts of given tokens.

        Begins when the engine that ran before has come to rest.

        Raises:
            EngineError: the engine has ended, or cannot decode so many sequences together.
        """
        time.sleep(SETTLING_SECONDS)
        try:
            steps = self._steps(prompts, output)
        except Exception as error:
            raise EngineError(self._reason(error)) from error
        return Answers.of(steps, len(prompts))

    def _steps(self, prompts: Sequence[Sequence[int]], output: int) -> list[Step]:
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        engine = self._llm.llm_engine
        steps: list[Step] = []
        tokens: dict[str, int] = {}
        start = time.perf_counter()
        for i, words in enumerate(prompts):
            engine.add_request(str(i), TokensPrompt(prompt_token_ids=list(words)), sampling)
        while engine.has_unfinished_requests():
            found = engine.step()
            tokens |= {one.request_id: len(one.outputs[0].token_ids) for one in found}
            ended = any(one.finished for one in found)
            steps.append(Step(time.perf_counter() - start, dict(tokens), ended))
        return steps

    def facts(self) -> dict[str, Any]:
        """Which checkpoint it serves, load time, kernel threads, memory; bytes of sparse layers.

        `load_seconds` is one sample, from the call of vLLM until it can answer: processes start,
        the checkpoint comes from the page cache if memory can hold it, is packed, and warms up. The
        first engine of a run also pays for what its process does once.

        `resident_mib` is what the engine's processes have to themselves: weights, KV cache, run
        time. `peak_mib` is the most that they and this process, their front end, have had together
        since the engine began to start: see `MemoryWatch`. `packed_bytes` and `dense_bytes` are
        those of the sparse linear layers, as the backend holds them and in bfloat16; `head_ratio`
        is what an output head takes of its bytes in a packed copy, once it has one.

        Raises:
            EngineError: the engine has ended.
        """
        try:
            used = sum(process.memory_full_info().uss for process in self._watch.processes())
        except psutil.NoSuchProcess as error:
            raise EngineError(self._reason(error)) from error
        self._watch.sample()
        facts = {
            "checkpoint": identity(self._model),
            "load_seconds": self._load_seconds,
            "threads": self._threads,
            "resident_mib": used / 2**20,
            "peak_mib": self._watch.peak_mib,
        }
        if self._dense:
            facts |= {"packed_bytes": self._packed, "dense_bytes": self._dense}
            facts["packed_ratio"] = self._packed / self._dense
            with _environment():
                ((copied, weight),) = self._llm.apply_model(head_bytes)
            if copied:
                facts["head_ratio"] = copied / weight
        return facts

    def of_worker(self, function: Callable[[Any], Answer]) -> Answer:
        """What a module's function returns, called with the one worker in its process."""
        with _environment():
            (answer,) = self._llm.collective_rpc(function)
        return cast("Answer", answer)

    def close(self) -> None:
        """Stop the processes, so that the next engine has the memory."""
        self._watch.close()
        self._llm.llm_engine.engine_core.shutdown()
        _end(self._watch.processes())
        self._log.close()
        self._forget()

    def _forget(self) -> None:
        if self._compiled is not None:
            self._compiled.cleanup()

    def _reason(self, error: Exception) -> str:
        if self._watch.exceeded:
            return self._watch.exceeded
        self._log.seek(0)
        found = reason(self._log.read().decode(errors="replace"), error)
        found = found.replace(f"{self._model.parent}/", "")  # where models lie is no news
        full = self._watch.full()
        return f"{found} ({full})" if full else found


class NoEngine:
    """In the place of an engine that did not start: its turns raise the reason."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def answers(self, batch: int, prompt: int, output: int) -> Answers:
        """Raise EngineError."""
        raise EngineError(self._reason)

    def facts(self) -> dict[str, Any]:
        """Nothing is known."""
        return {}

    def close(self) -> None:
        """Nothing is there to be ended."""


def read_once(folder: Path) -> None:
    """Read all files of a folder, so that whoever loads them next finds them in the page cache."""
    buffer = bytearray(READ_BYTES)
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def threads(worker: Any) -> int:
    """Kernel threads of the worker process in which this runs: its OMP_NUM_THREADS."""
    return torch.get_num_threads()


def reason(log: str, error: Exception) -> str:
    """The last error in a log of vLLM that says why, else the one that reached this process."""
    raised = [f"{kind.rpartition('.')[2]}: {text.strip()}" for kind, text in RAISED.findall(log)]
    telling = [line for line in raised if not any(words in line for words in NO_REASON)]
    text = telling[-1] if telling else f"{type(error).__name__}: {error}"
    return " ".join(text.split())[:REASON_LENGTH]


def alternate(
    engines: Mapping[str, Running], batch: int, prompt: int, output: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure every engine in turn, `repeats` times after warming up; yield a row of medians each.

    An engine that ends has a row with the reason under `refused`.
    """
    found: dict[str, list[Answers]] = {name: [] for name in engines}
    refused: dict[str, str] = {}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            if name in refused:
                continue
            try:
                if repeat == 0:
                    engine.answers(batch, min(prompt, WARM_UP_PROMPT), output)
                else:
                    found[name].append(engine.answers(batch, prompt, output))
            except EngineError as error:
                refused[name] = str(error)
    for name, engine in engines.items():
        row = {"variant": name, "batch": batch, "prompt_tokens": prompt, "output_tokens": output}
        facts: dict[str, Any] = {}
        try:
            facts = engine.facts()
        except EngineError as error:
            refused.setdefault(name, str(error))
        if name in refused:
            yield {**row, "refused": refused[name]}
            continue
        speed = statistics.median(one.decode_tokens_per_second for one in found[name])
        first = statistics.median(one.first_token_seconds for one in found[name])
        yield {
            **row,
            "repeats": repeats,
            "decode_tokens_per_second": speed,
            "time_to_first_token_ms": 1e3 * first,
            **facts,
            **conditions(),
        }


@contextmanager
def _environment(more: Mapping[str, str] = NOTHING) -> Iterator[None]:
    """Set what vLLM reads for as long as a `with` block lasts: the next server logs as it likes."""
    with patch.dict(os.environ, {**ENVIRONMENT, **ASKED, **kv_cache_environment(), **more}):
        yield


@contextmanager
def _output_to(file: IO[bytes]) -> Iterator[None]:
    """Send what this process and those that it starts write to the terminal to a file instead."""
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def _end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()
