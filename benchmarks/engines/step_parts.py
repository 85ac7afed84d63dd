"""Time inside the steps of a vLLM worker, by part: its runner and its modules call a stopwatch.

`watch` and `watched` are called in the process of the worker (`Engine.of_worker`), which serves as
it always does: no profiler runs, and a call of a part costs two readings of a clock.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch

SPARSE, PLUGIN, DENSE = "sparse linear", "the plugin around its operator", "other dense linear"
EXPERTS, AROUND_EXPERTS = "sparse experts", "around the experts, and dense ones"
LAYERS = "vllm.model_executor.layers"
MODULES = {
    f"{LAYERS}.logits_processor": "output head",
    f"{LAYERS}.attention": "attention and KV cache",
    f"{LAYERS}.layernorm": "norms",
    f"{LAYERS}.rotary_embedding": "rotary embedding",
    f"{LAYERS}.activation": "activations",
    f"{LAYERS}.fused_moe.runner": AROUND_EXPERTS,
}
"""Part of a module whose class, or one that this derives from, is defined there or below."""
SAMPLING = "sampling"
MODEL = "rest of the model"
"""The embedding, and Python of the decoder layers around their parts."""
RUNNER = "preparing the step"
"""What vLLM's runner does around the model: inputs, metadata of attention. It begins a step."""
BETWEEN = "scheduling, messages, waiting"
"""What nothing else covers: the processes of an engine, until they come to the next step."""
PARTS = (SPARSE, EXPERTS, PLUGIN, DENSE, *MODULES.values(), SAMPLING, MODEL, RUNNER, BETWEEN)


class Span(NamedTuple):
    """A call of a part; times in seconds of one clock."""

    part: str
    start: float
    stop: float


def by_step(spans: Iterable[Span]) -> list[dict[str, float]]:
    """Own seconds of every part in each step that another one follows.

    Args:
        spans: of one thread, so that two are apart or one is inside the other; a step lasts from a
            span of `RUNNER` to the next.
    """
    ordered = sorted(spans, key=lambda span: (span.start, -span.stop))
    begins = [place for place, span in enumerate(ordered) if span.part == RUNNER]
    return [
        seconds_by_part(ordered[begin:end], ordered[end].start)
        for begin, end in itertools.pairwise(begins)
    ]


def seconds_by_part(spans: Sequence[Span], end: float) -> dict[str, float]:
    """Own seconds of every part: of its spans, without the spans inside them.

    Args:
        spans: of a step, in the order of their start.
        end: of the step, in seconds of the clock; what no span covers is `BETWEEN`.
    """
    found = dict.fromkeys(PARTS, 0.0)
    found[BETWEEN] = end - spans[0].start
    around: list[Span] = []
    for span in spans:
        while around and around[-1].stop <= span.start:
            around.pop()
        found[around[-1].part if around else BETWEEN] -= span.stop - span.start
        found[span.part] += span.stop - span.start
        around.append(span)
    return found


def watch(worker: Any) -> None:
    """Have everything of a worker that is a part note when it is called and when it returns."""
    from vllm.model_executor.layers.linear import LinearBase

    from permllm_vllm.quantization import experts, linear

    spans: list[Span] = []
    runner = worker.model_runner
    runner.watched_spans = spans
    _time(runner, "execute_model", RUNNER, spans)
    _time(runner, "sample_tokens", SAMPLING, spans)
    _time(linear, "_sparse_linear", SPARSE, spans)  # for the layers of all models of the process
    _time(experts, "_sparse_experts", EXPERTS, spans)
    model = runner.get_model()
    _time(model, "forward", MODEL, spans)
    for module in model.modules():
        if isinstance(module, LinearBase):
            ours = isinstance(module.quant_method, linear.PermLLMLinearMethod)
            _time(module.quant_method, "apply", PLUGIN if ours else DENSE, spans)
        elif (part := part_of(module)) is not None:
            _time(module, "forward", part, spans)


def watched(worker: Any) -> list[dict[str, float]]:
    """Own seconds by part of the steps since the last call; see `by_step`."""
    spans: list[Span] = worker.model_runner.watched_spans
    found = by_step(spans)
    spans.clear()
    return found


def part_of(module: torch.nn.Module) -> str | None:
    """The part that a module is by `MODULES`, or None."""
    homes = [f"{kind.__module__}." for kind in type(module).__mro__]
    for prefix, part in MODULES.items():
        if any(home.startswith(f"{prefix}.") for home in homes):
            return part
    return None


def _time(owner: Any, name: str, part: str, spans: list[Span]) -> None:
    """Put in the place of a function one that calls it and notes the times."""
    function: Callable[..., Any] = getattr(owner, name)

    @functools.wraps(function)
    def timed(*arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            spans.append(Span(part, start, time.perf_counter()))

    setattr(owner, name, timed)
