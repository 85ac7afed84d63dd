"""vLLM engines without a server, in a process of their own that lives as long as the tests.

An engine changes the process that it runs in (threads, allocator, distributed state), and importing
vLLM takes longer than a tiny model needs to answer: so one process, started once, runs them all.
"""

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from tests.serving.engine_process import prepare_process

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
Prompt = Sequence[int] | Mapping[str, Any]
"""Tokens, or text with images as vLLM takes them."""
Result = TypeVar("Result")
PROMPTS: list[Prompt] = [range(5, 105), range(300, 340)]
"""For the random models, which have 512 tokens."""


class Answer(NamedTuple):
    """Greedy continuation of a prompt, and how sure the model was of what.

    `log_probabilities` are those of the tokens, `prompt_log_probabilities` those of the prompt's
    tokens but the first; `cached` prompt tokens came out of the prefix cache.
    """

    tokens: list[int]
    log_probabilities: Tensor
    prompt_log_probabilities: Tensor
    cached: int


class Run(NamedTuple):
    """What an engine answered, in the order of the prompts, its counters, and what multiplied.

    `backends` counts the sparse layers of all ranks by backend: `reference`, or `cpu` and the dtype
    of the values that its kernel reads. Experts of a layer are counted apart, under `experts`.
    """

    answers: list[Answer]
    counters: dict[str, float]
    backends: Counter[str]

    def tokens(self) -> list[list[int]]:
        """The greedy continuations."""
        return [answer.tokens for answer in self.answers]

    def difference(self, other: "Run") -> float:
        """Largest difference of any log-probability: for runs that chose the same tokens."""
        return float(self._differences(other).max())

    def mean_prompt_difference(self, other: "Run") -> float:
        """Mean difference over the tokens of the prompts, which are given to both."""
        return float(self._differences(other, generated=False).mean())

    def _differences(self, other: "Run", generated: bool = True) -> Tensor:
        pairs = list(zip(self.answers, other.answers, strict=True))
        found = [a.prompt_log_probabilities - b.prompt_log_probabilities for a, b in pairs]
        if generated:
            found += [a.log_probabilities - b.log_probabilities for a, b in pairs]
        return torch.cat(found).abs()


class Engines:
    """The process, as a context manager. What was run before is remembered, not run again."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, mp_context=context, initializer=_set_environment)
        self._runs: dict[str, Run] = {}

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)

    def run(
        self,
        model: Path,
        *batches: Sequence[Prompt],
        tokens: int = 16,
        adapter: Path | None = None,
        score_prompts: bool = True,
        **arguments: Any,
    ) -> Run:
        """Start an engine, let it continue the prompts of one batch after the other, stop it.

        `arguments` are vLLM's; what it raises is raised here.
        """
        asked = (model, batches, tokens, adapter, score_prompts, arguments)
        if repr(asked) not in self._runs:
            self._runs[repr(asked)] = self._process.submit(_run, *asked).result()
        return self._runs[repr(asked)]

    def call(self, function: Callable[[], Result]) -> Result:
        """What a function of a module returns in the process: that of vLLM's worker, of one rank.

        A model must have run there for what vLLM does to a process to be done.
        """
        return self._process.submit(function).result()

    def refusal(self, model: Path, **arguments: Any) -> str:
        """What vLLM says while an engine fails to start; "" when it starts."""
        return self._process.submit(_refusal, model, arguments).result()


def _set_environment() -> None:
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)  # OpenMP read its variable when torch was imported


def _run(
    model: Path,
    batches: Sequence[Sequence[Prompt]],
    tokens: int,
    adapter: Path | None,
    score_prompts: bool,
    arguments: dict[str, Any],
) -> Run:
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.lora.request import LoRARequest

    engine = _start(model, arguments)
    try:
        parameters = SamplingParams(
            temperature=0,
            max_tokens=tokens,
            logprobs=0,
            prompt_logprobs=0 if score_prompts else None,
            ignore_eos=True,
            detokenize=False,
        )
        lora = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
        answers = [
            _answer(output)
            for batch in batches
            for output in engine.generate(
                [
                    prompt
                    if isinstance(prompt, Mapping)
                    else TokensPrompt(prompt_token_ids=list(prompt))
                    for prompt in batch
                ],
                parameters,
                lora_request=lora,
                use_tqdm=False,
            )
        ]
        metrics = [metric for metric in engine.get_metrics() if hasattr(metric, "value")]
        counters = {metric.name: metric.value for metric in metrics}
        return Run(answers, counters, sum(engine.apply_model(_backends), Counter()))
    finally:
        engine.llm_engine.engine_core.shutdown()
        del engine
        gc.collect()


def _refusal(model: Path, arguments: dict[str, Any]) -> str:
    try:
        engine = _start(model, arguments)
    except Exception as error:
        return str(error)
    engine.llm_engine.engine_core.shutdown()
    return ""


def _start(model: Path, arguments: dict[str, Any]) -> Any:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    prepare_process()
    torch.compiler.reset()  # forget the graphs of the last engine
    gc.freeze()  # what is imported by now, so that no collection goes through it
    chosen = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 4,
        "num_gpu_blocks_override": 64,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        **arguments,
    }
    # vLLM's own helpers are compiled with a C++ compiler otherwise, even in an eager engine.
    torch._dynamo.config.disable = chosen["enforce_eager"]
    try:
        return LLM(str(model), **chosen)
    except Exception:
        cleanup_dist_env_and_memory()  # else the next engine would be built on half of this one
        raise


def _backends(model: Module) -> Counter[str]:
    """Count the sparse layers of one rank by what packed them: see `Run`.

    The reference backend leaves floating-point numbers, kernels read bytes; a scale is kept beside
    integers alone.
    """
    from vllm.model_executor.layers.linear import LinearBase

    from permllm_vllm.quantization.experts import PermLLMExpertsMethod
    from permllm_vllm.quantization.linear import PermLLMLinearMethod

    found: Counter[str] = Counter()
    for layer in model.modules():
        if isinstance(getattr(layer, "quant_method", None), PermLLMExpertsMethod):
            if layer.quant_method.dense is not None:
                found["experts reference"] += 1
            else:
                values = "bfloat16" if layer.w2_scale is None else "int8"
                found[f"experts cpu {values}"] += 1
        if not isinstance(layer, LinearBase):
            continue  # what wraps a layer for adapters shows the attributes of the layer
        if not isinstance(layer.quant_method, PermLLMLinearMethod):
            continue
        if layer.weight_packed.is_floating_point():
            found["reference"] += 1
        else:
            found["cpu bfloat16" if layer.weight_scale is None else "cpu int8"] += 1
    return found


def _answer(output: Any) -> Answer:
    (completion,) = output.outputs
    prompt = zip(output.prompt_token_ids[1:], (output.prompt_logprobs or [])[1:], strict=False)
    generated = zip(completion.token_ids, completion.logprobs, strict=True)
    return Answer(
        list(completion.token_ids),
        torch.tensor([entry[token].logprob for token, entry in generated]),
        torch.tensor([entry[token].logprob for token, entry in prompt]),
        output.num_cached_tokens or 0,
    )
