"""Learn the permutations of one span of decoder layers.

A step softens the logits (Sinkhorn), hardens them (assignment), runs the span under the masks that
follow, and moves the logits along the straight-through gradient of the cosine distance to what the
dense model gives there (Eq. 10 of arXiv 2510.10136).
"""

from __future__ import annotations

import logging
import math
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import Calibrated, LearningCurve
from permllm_offline.errors import OfflineError
from permllm_offline.model.recomputation import activations_are_large, recomputed
from permllm_offline.model.states import States
from permllm_offline.permutation.hardening import Hardener
from permllm_offline.permutation.learned_span import LearnedSpan
from permllm_offline.permutation.sinkhorn import sinkhorn
from permllm_offline.recipe.schema import LearningRecipe
from permllm_offline.run.processes import share, summed, total
from permllm_offline.run.schedules import cosine, shuffled_batches

logger = logging.getLogger(__name__)

BETAS = (0.9, 0.95)
"""Of AdamW: with tens of steps the second moment has no time for a longer memory."""

LOSS_SCALE = 2.0**14
"""Of the backward pass. The loss is a mean over tokens of an angle, whose gradient in the states
would underflow in float16; a power of two changes nothing in wider dtypes."""


def learn_span(
    calibrated: Calibrated,
    learned: LearnedSpan,
    name: str,
    states: States,
    targets: Tensor,
    of_model: float = 1.0,
) -> tuple[Tensor, LearningCurve]:
    """Learn the permutations of one span, with all its masks in place.

    Args:
        calibrated: its recipe.
        learned: the span.
        name: that progress and log give it.
        states: what enters the span.
        targets: [windows, sequence_length, hidden], what leaves it in the dense model.
        of_model: share of the model's decoder layers in the span.

    Returns:
        int64 [independent permutations, block_size], position -> channel: those with the lowest
        loss on the windows held out, and the learning curve.

    Raises:
        OfflineError: a loss or a gradient that is not finite.
    """
    constants = calibrated.recipe.learning
    tokens = constants.windows_at_once * calibrated.recipe.sequence_length
    item = calibrated.model.dtype.itemsize
    recompute = constants.gradient_checkpointing == "always" or (
        constants.gradient_checkpointing == "auto"
        and activations_are_large(calibrated.plan, tokens, item, of_model)
    )
    with recomputed(learned.layers) if recompute else nullcontext():
        return _Learner(calibrated, learned, name, states, targets).run()


class _Learner:
    """The state between two steps."""

    def __init__(
        self,
        calibrated: Calibrated,
        learned: LearnedSpan,
        name: str,
        states: States,
        targets: Tensor,
    ) -> None:
        self._constants, self._seed = calibrated.recipe.learning, calibrated.recipe.seed
        self._name = name
        self._learned = learned
        held_out = self._constants.validation_windows
        self._training = states[held_out:], targets[held_out:]
        self._validation = states[:held_out], targets[:held_out]
        self._hardener = Hardener()
        self._logits = initial_logits(learned.initial, self._constants, self._seed)
        self._logits = self._logits.to(learned.device).requires_grad_()
        self._optimizer = torch.optim.AdamW(
            [self._logits], betas=BETAS, weight_decay=self._constants.weight_decay
        )
        self._step = 0
        self._stale = 0
        self._curve: LearningCurve = []

    def run(self) -> tuple[Tensor, LearningCurve]:
        """Take all steps."""
        constants = self._constants
        self._best = self._soften(1)[1]
        self._best_loss = self._validate(self._best)
        self._curve.append({"step": 0, "validation_loss": self._best_loss})
        batches = shuffled_batches(len(self._training[0]), constants.windows_per_step, self._seed)
        progress = tqdm(total=constants.steps, desc=self._name, unit="step", leave=False)
        with progress:
            while self._step < constants.steps and not self._ended():
                loss = self._take_step(next(batches))
                self._curve.append({"step": self._step, "loss": loss})
                last = self._step == constants.steps
                if last or self._step % constants.validation_interval == 0:
                    self._choose_best()
                progress.update()
                progress.set_postfix(loss=f"{loss:.4f}", best=f"{self._best_loss:.4f}")
        logger.info(
            "%s: loss %.4f -> %.4f in %d steps, %d assignments solved",
            *(self._name, self._curve[0]["validation_loss"], self._best_loss, self._step),
            self._hardener.solved,
        )
        return self._best, self._curve

    def _take_step(self, batch: Tensor) -> float:
        constants, self._step = self._constants, self._step + 1
        soft, order = self._soften(self._step)
        self._learned.use(order, soft)
        loss = 0.0
        for part in share(batch).split(constants.windows_at_once):
            distance = self._learned.loss(self._training[0][part], self._training[1][part])
            (distance * (LOSS_SCALE * len(part) / len(batch))).backward()
            loss += distance.item() * len(part) / len(batch)
        loss = summed(loss)
        if not math.isfinite(loss):
            raise OfflineError(
                f"the learning loss of step {self._step} is {loss}: activations overflow under "
                "these masks. Give --dtype bfloat16 or float32."
            )
        gradient = total(self._learned.gradient())
        if not gradient.isfinite().all():
            raise OfflineError(
                f"the gradient of learning step {self._step} is not finite: activations overflow "
                "on the way back. Give --dtype bfloat16 or float32."
            )
        soft.backward(gradient / LOSS_SCALE)
        for group in self._optimizer.param_groups:
            group["lr"] = constants.learning_rate * cosine(self._step, constants.steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss

    def _soften(self, step: int) -> tuple[Tensor, Tensor]:
        """The soft permutations of a step, and the hard ones."""
        constants = self._constants
        soft = sinkhorn(self._logits, temperature(constants, step), constants.sinkhorn_iterations)
        return soft, self._hardener(soft)

    def _choose_best(self) -> None:
        with torch.no_grad():
            order = self._soften(self._step)[1]
        value = self._curve[-1]["validation_loss"] = self._validate(order)
        if value < self._best_loss:
            self._best, self._best_loss, self._stale = order, value, 0
        else:
            self._stale += 1

    def _ended(self) -> bool:
        """Whether validation has not improved for as long as the recipe waits."""
        return 0 < self._constants.patience <= self._stale

    @torch.no_grad()
    def _validate(self, order: Tensor) -> float:
        self._learned.use(order)
        states, targets = self._validation
        losses = [
            self._learned.loss(states[index : index + 1], targets[index : index + 1]).item()
            for index in share(torch.arange(len(states))).tolist()
        ]
        return summed(sum(losses)) / len(states)


def initial_logits(order: Tensor, constants: LearningRecipe, seed: int) -> Tensor:
    """Logits that learning starts from.

    Args:
        order: int64 [blocks, block_size], position -> channel: the heuristic reallocation.
        constants: ``initial`` is ``cp``: ``initial_logit`` where ``order`` has a channel and 0
            elsewhere; or ``random``: uniform within ``initial_logit`` of 0.
        seed: of the random ones.

    Returns:
        float32 [blocks, block_size, block_size], rows are channels and columns positions.
    """
    if constants.initial == "cp":
        return functional.one_hot(order).transpose(1, 2).float() * constants.initial_logit
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand((*order.shape, order.shape[1]), generator=generator)
    return (2 * uniform - 1) * constants.initial_logit


def temperature(constants: LearningRecipe, step: int) -> float:
    """Temperature of a step, 1..steps: linear from start to end."""
    done = (step - 1) / max(1, constants.steps - 1)
    return constants.temperature_start + done * (
        constants.temperature_end - constants.temperature_start
    )
