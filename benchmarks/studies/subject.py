"""The model that a study prunes, the text that it reads, and how much of both."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.remembered import remembered
from permllm_offline.calibration.kept_statistics import kept_statistics
from permllm_offline.calibration.statistics import DenseStatistics, collect
from permllm_offline.model.family import Family
from permllm_offline.model.loading import Source, load_model, open_source
from permllm_offline.model.lookup import family_of
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.prepared import Prepared, prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.in_memory import PrunedModel, prune_model
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.steps import Step, Work
from permllm_offline.text.evaluation import evaluation_windows, perplexity


@dataclass(frozen=True)
class Sizes:
    """How much a study reads and does; part of its result.

    ``windows`` are evaluated of each text; ``steps`` of ``windows_per_step`` windows learn.
    """

    calibration_windows: int
    windows: int
    sequence_length: int
    steps: int
    windows_per_step: int


LEARNING = Sizes(64, 16, 256, 15, 4)
MANY_CELLS = Sizes(64, 8, 256, 15, 4)
"""For studies of many cells whose models are alike: fewer windows tell them apart."""

QUICK = Sizes(8, 2, 32, 2, 1)


def facts(model: str, sizes: Sizes) -> dict[str, Any]:
    """What every measurement of a study depends on."""
    return {"model": model, **asdict(sizes), "threads": torch.get_num_threads()}


class SharedStatistics(Work):
    """Gives every prune the same statistics of the dense model."""

    def __init__(self, statistics: DenseStatistics) -> None:
        super().__init__()
        self._kept: Step | None = None
        kept_statistics(self, lambda **_: statistics)

    def step(self, name: str, compute: Callable[[], Step]) -> Step:
        """Return the result of a step: of ``statistics`` always the first one."""
        if name != "statistics":
            return super().step(name, compute)
        if self._kept is None:
            self._kept = super().step(name, compute)
        return self._kept


class Subject:
    """A dense model with its texts.

    Args:
        name: in the result.
        directory: of the model.
        calibration: text to calibrate on.
        evaluation: domain -> text that nothing is calibrated on.
        sizes: of everything.
        sources: name -> text, where a study compares what to calibrate on; ``calibration`` first.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        calibration: Path,
        evaluation: Mapping[str, Path],
        sizes: Sizes,
        sources: Mapping[str, Path],
    ) -> None:
        self.name, self.directory, self.calibration = name, directory, calibration
        self.sizes, self._evaluation, self.sources = sizes, evaluation, sources
        self._prepared: dict[Recipe, Prepared] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What every measurement depends on."""
        return facts(self.name, self.sizes)

    @cached_property
    def source(self) -> Source:
        """Folder and configuration of the model."""
        return open_source(str(self.directory))

    @property
    def family(self) -> Family:
        """Names of its modules."""
        return family_of(self.source.config)

    @property
    def layers(self) -> int:
        """How many decoder layers it has."""
        return int(self.source.config.num_hidden_layers)

    def load(self) -> Any:
        """The dense model."""
        return load_model(self.source, self.source.dtype, torch.device("cpu"))

    def recipe(self, method: str, **entries: Any) -> Recipe:
        """A 2:4 recipe of these sizes; ``entries`` go before."""
        sizes = self.sizes
        learning = {
            "steps": sizes.steps,
            "windows_per_step": sizes.windows_per_step,
            "windows_at_once": sizes.windows_per_step,
            "validation_interval": 5,
        }
        return make_recipe(
            {
                "model": str(self.directory),
                "method": method,
                "dataset": str(self.calibration),
                "num_samples": sizes.calibration_windows,
                "sequence_length": sizes.sequence_length,
                "evaluation_windows": 0,
                **entries,
                "learning": learning | entries.get("learning", {}),
            }
        )

    @cached_property
    def windows(self) -> Tensor:
        """The calibration windows: int64 [windows, sequence_length]."""
        prepared = self.prepared(self.recipe("wanda+cp"))
        assert prepared.windows is not None
        return prepared.windows.calibration

    @cached_property
    def statistics(self) -> DenseStatistics:
        """What calibration reads from the dense model, its last hidden states too."""
        return collect(self.load(), self.family, self.windows, hidden_states=True)

    def prepared(self, recipe: Recipe) -> Prepared:
        """What is checked before a prune; text is read once for each recipe."""
        if recipe not in self._prepared:
            self._prepared[recipe] = prepare(recipe)
        return self._prepared[recipe]

    def prune(self, recipe: Recipe) -> PrunedModel:
        """Prune as the command does; calibration is done once for all calls."""
        return prune_model(recipe, self.prepared(recipe), SharedStatistics(self.statistics))

    @cached_property
    def unseen(self) -> Mapping[str, Tensor]:
        """Windows of each text: int64 [windows, sequence_length]."""
        tokenizer, sizes = load_tokenizer(self.source), self.sizes
        return {
            domain: evaluation_windows(str(text), tokenizer, sizes.sequence_length, sizes.windows)
            for domain, text in self._evaluation.items()
        }

    def perplexity(self, model: Any) -> dict[str, float]:
        """Perplexity of a model on each text."""
        return {
            domain: perplexity(model, windows, domain) for domain, windows in self.unseen.items()
        }

    def dense(self) -> dict[str, Any]:
        """The measurements of the model before pruning."""
        return remembered(
            {"dense": str(self.directory), **self.facts, "texts": self._texts()},
            lambda: {"perplexity": self.perplexity(self.load())},
        )

    def pruned(self, recipe: Recipe) -> dict[str, Any]:
        """The measurements of the model after pruning.

        ``seconds`` are of the processor, all its threads together, after calibration;
        ``wall_seconds`` went by, other work included.
        """
        texts = self._texts(self.calibration)
        return remembered(
            {**recipe.model_dump(), **self.facts, "texts": texts}, lambda: self._pruned(recipe)
        )

    def _texts(self, *more: Path) -> list[str]:
        """Digests of what is evaluated, and of further texts."""
        files = (*self._evaluation.values(), *more)
        return [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]

    def _pruned(self, recipe: Recipe) -> dict[str, Any]:
        assert self.statistics is not None  # measured before the clock starts
        start, wall = time.process_time(), time.perf_counter()
        pruned = self.prune(recipe)
        found: dict[str, Any] = {
            "seconds": round(time.process_time() - start, 1),
            "wall_seconds": round(time.perf_counter() - wall, 1),
        }
        report = pruned.report
        if report.learning_curve:
            losses = [e["validation_loss"] for e in report.learning_curve if "validation_loss" in e]
            found |= {"loss_before": losses[0], "loss_after": min(losses)}
            found["learned"] = list(report.learned_layers)
        return found | {"perplexity": self.perplexity(pruned.model)}
