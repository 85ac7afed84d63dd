"""Learn the permutations end to end (PermLLM, arXiv 2510.10136): they move, weights do not.

Every shared-input group has its own logits. A step softens them (Sinkhorn), hardens them
(assignment), runs the model under the masks that follow, and moves the logits along the
straight-through gradient of the cosine distance to the dense model's last hidden state (Eq. 10).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from permllm_offline.calibrated import Calibrated, LearningCurve, Permutations
from permllm_offline.errors import OfflineError
from permllm_offline.learned_model import LearnedModel, learned_model
from permllm_offline.modules import decoder_layers
from permllm_offline.recipe import LearningRecipe
from permllm_offline.recomputation import activations_are_large, recomputed
from permllm_offline.schedules import shuffled_batches
from permllm_offline.sinkhorn import harden, sinkhorn

BETAS = (0.9, 0.95)
"""Of AdamW: with tens of steps the second moment has no time for a longer memory."""


def learn_permutations(
    calibrated: Calibrated,
) -> tuple[Permutations, LearningCurve]:
    """Learn the permutations of a model.

    Returns:
        The permutations with the lowest loss on calibration windows held out from learning (the
        heuristic reallocation, where learning starts, included), and the learning curve.

    Raises:
        OfflineError: too few calibration windows to hold some out.
    """
    constants = calibrated.recipe.learning
    windows, targets = calibrated.windows, calibrated.hidden_states
    assert windows is not None
    assert targets is not None
    held_out = constants.validation_windows
    if len(windows) < held_out + constants.windows_per_step:
        raise OfflineError(
            f"{len(windows)} calibration windows are too few to learn from: a step takes "
            f"{constants.windows_per_step} and {held_out} are held out to choose the best step. "
            "Raise --num-samples."
        )
    layers = decoder_layers(calibrated.model, calibrated.plan.family.layers)
    large = activations_are_large(calibrated, constants.windows_at_once)
    with learned_model(calibrated) as learned:
        with recomputed(layers) if large else nullcontext():
            order, curve = _optimise(
                learned,
                constants,
                calibrated.recipe.seed,
                (windows[held_out:], targets[held_out:]),
                (windows[:held_out], targets[:held_out]),
            )
        return learned.permutations(order), curve


def _optimise(
    learned: LearnedModel,
    constants: LearningRecipe,
    seed: int,
    training: tuple[Tensor, Tensor],
    validation: tuple[Tensor, Tensor],
) -> tuple[Tensor, LearningCurve]:
    logits = initial_logits(learned.initial, constants.initial_logit).to(learned.device)
    logits.requires_grad_()
    optimizer = torch.optim.AdamW(
        [logits],
        lr=constants.learning_rate,
        weight_decay=constants.weight_decay,
        betas=BETAS,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, constants.steps)
    batches = shuffled_batches(len(training[0]), constants.windows_per_step, seed)
    best, best_loss = learned.initial, _validate(learned, learned.initial, validation)
    curve: LearningCurve = [{"step": 0, "validation_loss": best_loss}]
    progress = tqdm(range(1, constants.steps + 1), desc="learning", unit="step")
    for step in progress:
        soft = sinkhorn(logits, temperature(constants, step), constants.sinkhorn_iterations)
        learned.use(harden(soft), soft)
        loss = 0.0
        batch = next(batches)
        for part in batch.split(constants.windows_at_once):
            distance = learned.loss(training[0][part], training[1][part])
            (distance * (len(part) / len(batch))).backward()
            loss += distance.item() * len(part) / len(batch)
        soft.backward(learned.gradient())
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        curve.append({"step": step, "loss": loss})
        if step % constants.validation_interval == 0 or step == constants.steps:
            order = _hard(logits.detach(), constants, step)
            value = curve[-1]["validation_loss"] = _validate(learned, order, validation)
            if value < best_loss:
                best, best_loss = order, value
        progress.set_postfix(loss=f"{loss:.4f}", best=f"{best_loss:.4f}")
    return best, curve


def _hard(logits: Tensor, constants: LearningRecipe, step: int) -> Tensor:
    return harden(sinkhorn(logits, temperature(constants, step), constants.sinkhorn_iterations))


def initial_logits(order: Tensor, height: float) -> Tensor:
    """Logits whose hard permutation is ``order``: ``height`` there and 0 elsewhere.

    Args:
        order: int64 [blocks, block_size], position -> channel.
        height: positive; how much evidence it takes to leave the initial permutation.

    Returns:
        float32 [blocks, block_size, block_size], rows are channels and columns positions.
    """
    return functional.one_hot(order).transpose(1, 2).float() * height


def temperature(constants: LearningRecipe, step: int) -> float:
    """Temperature of a step, 1..steps: linear from start to end."""
    done = (step - 1) / max(1, constants.steps - 1)
    return constants.temperature_start + done * (
        constants.temperature_end - constants.temperature_start
    )


@torch.no_grad()
def _validate(learned: LearnedModel, order: Tensor, validation: tuple[Tensor, Tensor]) -> float:
    learned.use(order)
    losses = [
        learned.loss(window[None], target[None]).item()
        for window, target in zip(*validation, strict=True)
    ]
    return sum(losses) / len(losses)
