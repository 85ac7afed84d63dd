"""Tasks of lm-eval (HellaSwag, ARC, ...) on a dense or permllm checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError, first_line
from permllm_offline.model.float32_products import products_in_float32

MISSING = "the tasks are those of lm-eval, which is not installed: pip install 'lm-eval>=0.4.13'"


class Tasks:
    """Tasks by name, looked up before a model is loaded.

    Args:
        names: of lm-eval's own tasks, groups or tags, or of those in ``folder``.
        folder: task descriptions in YAML beside lm-eval's own; lm-eval runs Python code that they
            name, so take only such as you trust.

    Raises:
        OfflineError: lm-eval is missing, or there is no such folder or task.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        if find_spec("lm_eval") is None:
            raise OfflineError(MISSING)
        if folder is not None and not folder.is_dir():
            raise OfflineError(
                f"{str(folder)!r} is not a folder: give one that holds task descriptions of lm-eval"
                " (*.yaml)."
            )
        self.names = list(names)
        self._manager = _task_manager(self.names, folder)
        unknown = [name for name in names if name not in self._manager.all_tasks]
        if unknown or not names:
            raise OfflineError(
                f"lm-eval knows no task {', '.join(map(repr, unknown)) or 'of no name'}: see "
                "`lm-eval ls tasks`, or give the folder of its description with --tasks-path."
            )

    @products_in_float32()
    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        *,
        few_shot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
    ) -> dict[str, dict[str, float]]:
        """Run the tasks through lm-eval's ``hf`` model.

        Args:
            model: causal language model of transformers.
            tokenizer: its tokenizer.
            few_shot: examples before each question; by default what the task says.
            limit: questions of each task; by default all.
            batch_size: sequences at a time.

        Returns:
            task -> metric -> value, standard errors as ``METRIC_stderr``. A metric that lm-eval
            takes of filtered answers is ``METRIC,FILTER``.

        Raises:
            OfflineError: the data of a task cannot be had, or it cannot be run on this model.
        """
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = simple_evaluate(
                HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=self.names,
                num_fewshot=few_shot,
                limit=limit,
                task_manager=self._manager,
                log_samples=False,
                bootstrap_iters=1000,
            )
        except Exception as error:  # lm-eval and datasets raise too many kinds to list
            raise OfflineError(
                f"lm-eval could not run {', '.join(self.names)} ({first_line(error)}). "
                "Tasks fetch their data from the Hugging Face hub unless their "
                "description names local files: check the network, or give such tasks with "
                "--tasks-path."
            ) from error
        return {task: _metrics(entries) for task, entries in found["results"].items()}


def _task_manager(names: Sequence[str], folder: Path | None) -> Any:
    """Know the tasks of a folder, and where they do not do, lm-eval's own: thousands of files."""
    from lm_eval.tasks import TaskManager

    place = None if folder is None else str(folder)
    manager = TaskManager(include_path=place, include_defaults=False)
    if all(name in manager.all_tasks for name in names):
        return manager
    return TaskManager(include_path=place)


def _metrics(entries: dict[str, Any]) -> dict[str, float]:
    """Keep the numbers of one task; lm-eval writes a metric as ``acc,none``, or with a filter."""
    return {
        name.removesuffix(",none"): float(value)
        for name, value in entries.items()
        if isinstance(value, int | float) and "," in name and math.isfinite(value)
    }
