"""vLLM engines that take turns: whatever else the machine does falls on all of them."""

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
ENGINE_OPTIONS: Mapping[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "skip_tokenizer_init": True,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


class Engine:
    """A vLLM engine in processes of its own that answers with a fixed number of tokens."""

    def __init__(self, model: Path, *, eager: bool) -> None:
        os.environ.update(ENVIRONMENT)
        from vllm import LLM

        others = set(_descendants())
        start = time.perf_counter()
        self._llm = LLM(model=str(model), enforce_eager=eager, **ENGINE_OPTIONS)
        self.load_seconds = time.perf_counter() - start
        self._processes = [process for process in _descendants() if process not in others]

    def seconds(self, batch: int, prompt: int, output: int) -> float:
        """Wall time of `batch` answers of exactly `output` tokens to prompts of `prompt` tokens."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [
            TokensPrompt(prompt_token_ids=[3 + (7 * i + 13 * j) % 30000 for j in range(prompt)])
            for i in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self._llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    def resident_mib(self) -> float:
        """Memory that the engine's processes have to themselves: weights, KV cache, run time."""
        total = sum(process.memory_full_info().uss for process in self._processes)
        return float(total / 2**20)

    def close(self) -> None:
        """Stop the processes, so that the next engine has the memory."""
        self._llm.llm_engine.engine_core.shutdown()
        _, alive = psutil.wait_procs(self._processes, timeout=10)
        for process in alive:
            process.kill()


def alternate(
    engines: Mapping[str, Engine], batch: int, prompt: int, output: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure every engine in turn, `repeats` times after one warm-up; yield a row for each.

    Decode speed is (output - 1) tokens over the time that is left when the time of a one-token
    answer is taken off.
    """
    first: dict[str, list[float]] = {name: [] for name in engines}
    whole: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            times = engine.seconds(batch, prompt, 1), engine.seconds(batch, prompt, output)
            if repeat:
                first[name].append(times[0])
                whole[name].append(times[1])
    for name, engine in engines.items():
        decode = [w - f for w, f in zip(whole[name], first[name], strict=True)]
        yield {
            "variant": name,
            "batch": batch,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "repeats": repeats,
            "decode_tokens_per_second": batch * (output - 1) / statistics.median(decode),
            "time_to_first_token_ms": 1e3 * statistics.median(first[name]),
            "load_seconds": engine.load_seconds,
            "resident_mib": engine.resident_mib(),
        }


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)
