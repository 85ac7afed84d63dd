"""Distil the dense model into the kept weights of its pruned copy, end to end.

Masks and permutations stay; the kept weights of all layers move together, along the gradient of the
divergence between the next-token distributions of the dense and of the pruned model. The dense
model itself is not needed: its head is the pruned model's, and its last hidden states are those
that calibration kept.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import Calibrated, LearningCurve
from permllm_offline.errors import OfflineError
from permllm_offline.model.conventions import logit_scale
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_offline.model.recomputation import activations_are_large, recomputed
from permllm_offline.reconstruction.divergence import divergence
from permllm_offline.reconstruction.head_inputs import head_input, head_inputs_of
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.run.processes import collected, share, summed
from permllm_offline.run.schedules import shuffled_batches, warmed_cosine
from permllm_offline.run.steps import Step, Work
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.sparsity.int4_values import Int4Grid
from permllm_offline.text.windows import require_windows

logger = logging.getLogger(__name__)

_NAME = "distillation"


def distil(
    calibrated: Calibrated,
    decisions: Sequence[LayerDecision],
    grids: Sequence[Mapping[str, Int4Grid]] = (),
) -> LearningCurve:
    """Tune the kept weights of a pruned model in place.

    The weights with the lowest divergence on calibration windows held out from tuning stay, those
    at the start included. A step takes windows that ``recipe.seed`` decides. With ``grids``, linear
    -> grid of each decoder layer, all of them lie on these.

    Returns:
        The curve: per step its loss, and now and then the validation loss, in nats per token.

    Raises:
        OfflineError: too few calibration windows to hold some out, or a loss that is not finite.
    """
    constants, windows = calibrated.recipe.distillation, calibrated.windows
    targets = calibrated.hidden_states
    assert windows is not None
    assert targets is not None
    held_out = constants.validation_windows
    require_windows(len(windows), constants.windows_per_step, held_out, "distil from", "weights")
    model, family = calibrated.model, calibrated.plan.family
    layers = decoder_layers(model, family.layers)
    named = [
        (layer, name, mask)
        for layer, decision in zip(layers, decisions, strict=True)
        for group in decision
        for name, mask in group.masks.items()
    ]
    linears = [linear_of(layer, name) for layer, name, _ in named]
    masks = [mask for _, _, mask in named]
    own_grids = [
        layer[name]
        for layer, decision in zip(grids, decisions, strict=bool(grids))
        for group in decision
        for name in group.masks
    ]
    targets = head_inputs_of(model, family, targets)
    pupil = Pupil(model)
    length, item = calibrated.recipe.sequence_length, model.dtype.itemsize
    large = activations_are_large(calibrated.plan, length, item)
    with (
        KeptWeights(linears, masks, grids=own_grids, shared=True) as kept,
        recomputed(layers) if large else nullcontext(),
    ):
        return _optimise(
            pupil,
            kept,
            calibrated,
            (windows[held_out:], targets[held_out:]),
            (windows[:held_out], targets[:held_out]),
        )


class Pupil:
    """The pruned model, measured against what the head of the dense one reads."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._head = model.get_output_embeddings().weight
        text = model.config.get_text_config()
        self._scale = logit_scale(text)
        self._softcap = getattr(text, "final_logit_softcapping", None)

    def loss(self, window: Tensor, target: Tensor) -> Tensor:
        """Sum over tokens of the divergence from the dense model, in nats.

        Args:
            window: int64 [sequence_length].
            target: [sequence_length, width], what the head of the dense model reads.
        """
        target = target.to(self._head.device, self._head.dtype)
        student = self._scale * head_input(self._model, window)
        return divergence(student, self._scale * target, self._head, self._softcap)


def _optimise(
    pupil: Pupil,
    kept: KeptWeights,
    calibrated: Calibrated,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
) -> LearningCurve:
    constants, seed = calibrated.recipe.distillation, calibrated.recipe.seed
    state = _kept_state(calibrated.work, kept)
    if state is None:
        before = _validate(pupil, validation)
        kept.remember()
        state = _State(before, [{"step": 0, "validation_loss": before}])
    done, curve = len(state.curve) - 1, state.curve
    batches = islice(
        shuffled_batches(len(training[0]), constants.windows_per_step, seed), done, None
    )
    steps = range(done + 1, constants.steps + 1)
    progress = tqdm(steps, desc="distillation", unit="step", initial=done, total=constants.steps)
    for step in progress:
        batch, total = next(batches), 0.0
        for index in share(batch).tolist():
            loss = pupil.loss(training[0][index], training[1][index])
            loss.backward()
            total += loss.item()
        total, tokens = summed(total), len(batch) * training[0].shape[1]
        if not math.isfinite(total):
            raise OfflineError(
                f"the distillation loss of step {step} is {total}: the steps are too large, or the "
                "dtype too narrow. Lower the learning rate of the recipe's distillation, or give "
                "--dtype bfloat16."
            )
        rate = constants.learning_rate * warmed_cosine(
            step, constants.steps, constants.warmup_share
        )
        kept.step(rate)
        curve.append({"step": step, "loss": total / tokens})
        if step % constants.validation_interval == 0 or step == constants.steps:
            value = curve[-1]["validation_loss"] = _validate(pupil, validation)
            if value < state.best_loss:
                state.best_loss = value
                kept.remember()
            calibrated.work.keep_interval(_NAME, state.step(kept))
        progress.set_postfix(loss=f"{total / tokens:.3f}", best=f"{state.best_loss:.3f}")
    kept.recall()
    logger.info("divergence %.3f -> %.3f nats", curve[0]["validation_loss"], state.best_loss)
    return curve


@dataclass
class _State:
    """What a run that was cut off needs beside the weights."""

    best_loss: float
    curve: LearningCurve

    def step(self, kept: KeptWeights) -> Step:
        """All of it, with the weights, for the work folder of the first process."""
        facts = {"best_loss": self.best_loss, "curve": self.curve}
        return Step(collected(kept.state()), facts)


def _kept_state(work: Work, kept: KeptWeights) -> _State | None:
    """Give the weights their state of an unfinished run, if there is one, and return the rest."""
    step = work.interval(_NAME)
    if step is None:
        return None
    kept.load_state(step.tensors)
    return _State(step.facts["best_loss"], list(step.facts["curve"]))


@torch.no_grad()
def _validate(pupil: Pupil, validation: tuple[Tensor, Tensor]) -> float:
    windows, targets = validation
    losses = [
        pupil.loss(windows[index], targets[index]).item()
        for index in share(torch.arange(len(windows))).tolist()
    ]
    return summed(sum(losses)) / windows.numel()
