"""Time to equal quality on SmolLM2-135M: the paper's dense loop, then this project's."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.models import smollm2
from benchmarks.pruning.checkpoints import processor_time
from benchmarks.pruning.dense_permutations import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    DenseMaskedLinear,
    DensePermutation,
    SharedMatrix,
    epoch_temperature,
    sequence_norm,
)
from benchmarks.texts import austen, python_manual, sotu
from permllm_offline.calibration.statistics import collect, last_hidden_state
from permllm_offline.model.loading import load_model
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.permutation.learned_span import cosine_distance
from permllm_offline.preparation.prepared import Prepared, prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.schedules import cosine, shuffled_batches
from permllm_offline.sparsity.importance import wanda
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN = Pattern(2, 4)
SAMPLES, SEQUENCE_LENGTH, BATCH = 32, 512, 8
OUR_STEPS = (5, 10, 20, 40, 80)
EVALUATED = 64


@dataclass(frozen=True)
class Learned:
    """One run of a loop: what calibration and learning took, and the perplexities that it reached.

    ``processor_seconds`` counts all threads: other work does not add to them. ``load_average`` is
    that of five minutes, at the end. Older results lack both.
    """

    loop: str
    steps: int
    seconds: float
    processor_seconds: float
    load_average: float
    perplexity: Mapping[str, float]


class QualityTime:
    """Both loops on the same windows of the same text.

    Args:
        seed: of the windows and of learning.
        steps: of the dense loop, of 8 windows each.
        quick: a few short windows, only to see that it runs.
    """

    def __init__(self, seed: int, steps: int, *, quick: bool) -> None:
        self._seed, self._steps = seed, steps
        self._batch = 1 if quick else BATCH
        self._our_steps = OUR_STEPS[:1] if quick else OUR_STEPS
        self._samples, self._length = (6, 32) if quick else (SAMPLES, SEQUENCE_LENGTH)
        self._prepared = prepare(self._recipe(steps))
        tokenizer = load_tokenizer(self._prepared.source)
        count = 2 if quick else EVALUATED
        self._texts = {
            domain: evaluation_windows(str(text), tokenizer, self._length, count)
            for domain, text in (
                ("in domain", sotu().held_out),
                ("novels", austen()),
                ("manual", python_manual()),
            )
        }

    def measure(self, known: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Run the dense loop, then ours with more and more steps until it is no worse on any text.

        Yields what is new after each. Each run is one sample. The model is read and run once before
        the first.

        Args:
            known: what a run that was stopped has yielded, which is not run again.
        """
        self._warm_up()
        dense = known.get("baseline")
        if dense is None:
            dense = asdict(self._dense_loop())
            yield {"baseline": dense}
        ours = list(known.get("ours", ()))
        for steps in self._our_steps[len(ours) :]:
            if ours and self._reached(ours[-1], dense):
                break
            ours.append(asdict(self._ours(steps)))
            yield {"ours": list(ours)}
        reached = self._reached(ours[-1], dense)
        shares = {"share_of_time": "seconds", "share_of_processor_time": "processor_seconds"}
        yield {
            "reached": reached,
            **{s: ours[-1][name] / dense[name] if reached else None for s, name in shares.items()},
        }

    def _reached(self, ours: Mapping[str, Any], dense: Mapping[str, Any]) -> bool:
        return all(ours["perplexity"][d] <= dense["perplexity"][d] for d in self._texts)

    def _warm_up(self) -> None:
        """Read the model and run it once, so that the first loop is no colder than the others."""
        prepared = self._prepared
        assert prepared.windows is not None
        model = load_model(prepared.source, prepared.dtype, prepared.device)
        with torch.no_grad():
            last_hidden_state(model, prepared.plan.family, prepared.windows.calibration[:1])

    def references(self) -> dict[str, dict[str, float]]:
        """Perplexities of the dense model, and of Wanda with these calibration windows."""
        source = self._prepared.source
        dense = load_model(source, self._prepared.dtype, self._prepared.device)
        wanda = make_recipe(self._entries() | {"method": "wanda"})
        return {
            "dense": self._perplexities(dense),
            "wanda": self._perplexities(prune_model(wanda, prepare(wanda)).model),
        }

    def _entries(self) -> dict[str, Any]:
        return {
            "model": str(smollm2()),
            "dataset": str(sotu().calibration),
            "num_samples": self._samples,
            "sequence_length": self._length,
            "evaluation_windows": 0,
            "seed": self._seed,
        }

    def _recipe(self, steps: int) -> Recipe:
        learning = {"steps": steps}
        if self._samples < SAMPLES:
            learning |= {"windows_per_step": 1, "validation_windows": 1}
        return make_recipe(self._entries() | {"method": "permllm-wanda", "learning": learning})

    def _ours(self, steps: int) -> Learned:
        recipe = self._recipe(steps)
        return self._run("ours", steps, lambda: prune_model(recipe, self._prepared).model)

    def _dense_loop(self) -> Learned:
        steps = self._steps
        learn = partial(learn_densely, self._prepared, self._seed, steps, self._batch)
        return self._run("dense", steps, learn)

    def _run(self, loop: str, steps: int, learn: Callable[[], Any]) -> Learned:
        start, processor = time.perf_counter(), processor_time()
        model = learn()
        seconds, processor = time.perf_counter() - start, processor_time() - processor
        load = round(os.getloadavg()[1], 1)
        return Learned(loop, steps, seconds, processor, load, self._perplexities(model))

    def _perplexities(self, model: Any) -> dict[str, float]:
        return {domain: perplexity(model, windows) for domain, windows in self._texts.items()}


def learn_densely(prepared: Prepared, seed: int, steps: int, batch: int) -> Any:
    """Learn by dense matrices, end to end, and return the model under its last masks."""
    assert prepared.windows is not None
    windows, plan = prepared.windows.calibration, prepared.plan
    model = load_model(prepared.source, prepared.dtype, prepared.device)
    found = collect(model, plan.family, windows, hidden_states=True)
    assert found.hidden_states is not None
    generator = torch.Generator().manual_seed(seed)
    shared: list[SharedMatrix] = []
    for index, layer in enumerate(decoder_layers(model, plan.family.layers)):
        for layout in plan.layers[index]:
            norm = sequence_norm(found.norms[index][layout.group.name], windows.shape[1])
            permutation = DensePermutation(layout.in_features, layout.block_size, generator)
            matrix = SharedMatrix(permutation.to(prepared.dtype))
            shared.append(matrix)
            for name in layout.group.linears:
                linear = linear_of(layer, name)
                score = wanda(linear.weight.detach(), norm)[:]
                layer.set_submodule(name, DenseMaskedLinear(linear, score, PATTERN, matrix))
    state = partial(last_hidden_state, model, plan.family)
    _take_steps(shared, state, windows, found.hidden_states, seed, steps, batch)
    _freeze(model)
    return model


def _take_steps(
    shared: Sequence[SharedMatrix],
    state: Callable[[Tensor], Tensor],
    windows: Tensor,
    targets: Tensor,
    seed: int,
    steps: int,
    batch: int,
) -> None:
    parameters = [p for matrix in shared for p in matrix.permutation.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=WEIGHT_DECAY)
    batches = shuffled_batches(len(windows), batch, seed)
    epoch_steps = len(windows) // batch
    epochs = math.ceil(steps / epoch_steps)
    for step in tqdm(range(1, steps + 1), desc="dense loop", unit="step"):
        temperature = epoch_temperature((step - 1) // epoch_steps, epochs)
        for matrix in shared:
            matrix.permutation.temperature = temperature
            matrix.forget()
        chosen = next(batches)
        cosine_distance(state(windows[chosen]), targets[chosen]).backward()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * cosine(step, steps)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def _freeze(model: Any) -> None:
    """Put linears with the masks of the last forward pass in the place of the learning ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, DenseMaskedLinear):
            module.linear.weight.mul_(module.mask())
            model.set_submodule(name, module.linear)
