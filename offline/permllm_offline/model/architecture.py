"""What a model was trained for, by the class that its configuration names."""

from __future__ import annotations

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source

OTHER_TASKS = ("Classification", "QuestionAnswering", "RewardModel")
"""Endings of classes that have another head than a language model's, which writes text."""


def require_language_model(source: Source) -> None:
    """Raise OfflineError for a model with another head, such as a classifier's ``score``.

    Its text could neither be continued nor judged, and engines would look for a sparse head.
    """
    for name in source.config.architectures or ():
        if name.endswith(OTHER_TASKS):
            raise OfflineError(
                f"{source.name!r} is a {name} by its config.json, whose head is neither calibrated "
                "nor served: give the language model that it was made from."
            )
