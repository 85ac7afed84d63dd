"""The steps in which the permutations of one span are learned."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.states import States
from permllm_offline.permutation.hardening import harden
from permllm_offline.permutation.learned_span import LearnedSpan, learned_span
from permllm_offline.permutation.sinkhorn import sinkhorn
from permllm_offline.permutation.span_learning import _Learner, initial_logits, temperature
from permllm_offline.recipe.schema import LearningRecipe
from tests.offline.permutation.test_learning import calibrated_tiny


@contextmanager
def whole_model(
    directory: Path, nudge: float = 0.0, **learning: object
) -> Iterator[tuple[LearnedSpan, _Learner, States, Tensor]]:
    """All layers as one span, its learner, and what enters and leaves it; 4 windows are held out.

    ``nudge`` moves the targets of these.
    """
    calibrated = calibrated_tiny(directory, **learning)
    assert calibrated.hidden_states is not None
    calls = record_calls(calibrated.model, calibrated.plan.family, calibrated.windows)
    targets = calibrated.hidden_states.clone()
    targets[:4] += nudge * torch.randn(targets[:4].shape)
    with learned_span(calibrated, range(2), range(2), calls.layers) as span:
        yield span, _Learner(calibrated, span, "test", calls.states, targets), calls.states, targets


def test_held_out_windows_are_never_learned_from(tiny_model_directory: Path) -> None:
    moved = []
    for nudge in (0.0, 1.0):
        constants = {"steps": 4, "validation_interval": 4, "windows_per_step": 4}
        with whole_model(tiny_model_directory, nudge, **constants) as (_, learner, _, _):
            before = learner._logits.detach().clone()
            learner.run()
        moved.append(learner._logits.detach() - before)
    assert moved[0].any()
    assert torch.equal(moved[0], moved[1])


def test_the_steps_are_those_of_adamw(tiny_model_directory: Path) -> None:
    """Under falling temperatures and rates, with one window to learn from."""
    constants = {"steps": 3, "windows_per_step": 1, "validation_windows": 11, "learning_rate": 0.2}
    with whole_model(tiny_model_directory, **constants) as (span, learner, states, targets):
        logits = learner._logits.detach().clone().requires_grad_()
        adam = torch.optim.AdamW([logits], betas=(0.9, 0.95), weight_decay=0.1)
        for heat, rate in ((1.0, 0.2), (0.55, 0.15), (0.1, 0.05)):
            soft = sinkhorn(logits, heat, 5)
            span.use(harden(soft), soft)
            span.loss(states[11:], targets[11:]).backward()
            soft.backward(span.gradient())
            adam.param_groups[0]["lr"] = rate
            adam.step()
            adam.zero_grad()
            learner._take_step(torch.tensor([0]))
            torch.testing.assert_close(learner._logits, logits, rtol=0, atol=1e-5)


def test_what_is_validated_has_the_temperature_of_the_step(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without iterations the soft permutations are no stochastic matrices, and harden to others."""
    constants = {"steps": 2, "sinkhorn_iterations": 0, "initial": "random", "learning_rate": 0.3}
    with whole_model(tiny_model_directory, **constants) as (_, learner, _, _):
        validated: list[Tensor] = []
        monkeypatch.setattr(learner, "_validate", lambda order: validated.append(order) or 1.0)
        learner.run()
        logits = learner._logits.detach()
    expected, other = (harden(sinkhorn(logits, heat, 0)) for heat in (0.1, 1.0))
    assert not torch.equal(expected, other)
    assert torch.equal(validated[-1], expected)


def test_float16_learns_what_float32_does(tiny_model_directory: Path) -> None:
    """States so large that the gradient of a mean over all tokens would underflow in float16."""
    states = 10000 * torch.randn((8, 24, 128), generator=torch.Generator().manual_seed(0))
    moved = []
    for dtype in (torch.float32, torch.float16):
        calibrated = calibrated_tiny(
            tiny_model_directory, steps=1, windows_per_step=4, windows_at_once=4
        )
        calibrated.model.to(dtype)
        calls = record_calls(calibrated.model, calibrated.plan.family, calibrated.windows[:8])
        with learned_span(calibrated, range(2), range(2), calls.layers) as span:
            learner = _Learner(
                calibrated, span, "test", States(states.to(dtype)), 2 * states.flip(2)
            )
            before = learner._logits.detach().clone()
            learner._take_step(torch.arange(4))
        moved.append((learner._logits.detach() - before).sign())
    assert moved[0].any()
    assert float((moved[0] == moved[1]).float().mean()) > 0.9


@pytest.mark.parametrize("height", [0.2, 1e4])
def test_initial_logits_harden_to_the_initial_permutation(height: float) -> None:
    order = torch.stack([torch.randperm(64) for _ in range(4)])
    soft = sinkhorn(initial_logits(order, LearningRecipe(initial_logit=height), 0), 1.0, 5)
    assert torch.equal(harden(soft), order)


def test_random_logits_depend_on_the_seed_alone() -> None:
    order = torch.arange(32).expand(3, -1)
    constants = LearningRecipe(initial="random", initial_logit=0.5)
    first, second, other = (initial_logits(order, constants, seed) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert 0.45 < float(first.abs().max()) <= 0.5


def test_temperature_runs_linearly_from_start_to_end() -> None:
    constants = LearningRecipe(steps=10)
    assert temperature(constants, 1) == 1.0
    assert temperature(constants, 10) == pytest.approx(0.1)
    assert temperature(constants, 4) == pytest.approx(0.7)
    assert temperature(LearningRecipe(steps=1), 1) == 1.0
