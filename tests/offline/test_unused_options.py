"""What a user gives that does nothing for the method is named in a warning."""

from typing import Any

import pytest

from permllm_offline.api import asked_recipe


@pytest.mark.parametrize(
    ("changes", "effort", "messages"),
    [
        ({"method": "wanda"}, "low", ["wanda distils nothing: --effort low is of no use"]),
        ({"method": "wanda", "reconstruction": "distillation"}, "low", []),
        ({"method": "permllm-best"}, "low", []),
        ({"method": "wanda"}, None, []),
        (
            {"method": "wanda", "block_size": 32},
            None,
            ["wanda permutes no channels: block_size is of no use"],
        ),
        ({"method": "wanda+cp", "block_size": 32}, None, []),
        (
            {"method": "magnitude", "num_samples": 3, "sampling": "document"},
            None,
            ["magnitude reads no text without --dataset: --num-samples, sampling is of no use"],
        ),
        ({"method": "magnitude", "dataset": "x.txt", "num_samples": 3}, None, []),
        (
            {"dataset": "self", "sampling": "document", "text_field": "body"},
            None,
            ["the model writes its text itself: sampling, --text-field is of no use"],
        ),
        ({"dataset": ("self", "x.jsonl"), "text_field": "body"}, None, []),
        ({"method": "wanda", "dataset": "x.txt", "num_samples": 3}, None, []),
        (
            {"method": "wanda", "learning": {"steps": 3}},
            None,
            ["wanda learns no permutation: learning.steps is of no use"],
        ),
        (
            {"method": "permllm-wanda", "learning": {"window": 2}},
            None,
            [
                "permllm-wanda learns end to end: learning.window is of no use without "
                "`learning.scope: window`"
            ],
        ),
        ({"method": "permllm-wanda", "learning": {"window": 2, "scope": "window"}}, None, []),
        (
            {"method": "wanda", "distillation": {"steps": 3, "self_windows": 1}},
            None,
            ["wanda distils nothing: distillation.steps, distillation.self_windows is of no use"],
        ),
        ({"method": "permllm-best", "distillation": {"steps": 3}}, None, []),
        (
            {"method": "permllm-best", "blockwise": {"steps": 3}},
            None,
            ["permllm-best tunes no layer by itself: blockwise.steps is of no use"],
        ),
        (
            {"method": "wanda", "dataset": "x.txt", "smoothing": False},
            None,
            [
                "inputs are smoothed before --values int8 or int4 are chosen, as --dataset shows "
                "them: without both, smoothing is of no use"
            ],
        ),
        (
            {"method": "magnitude", "values": "int8", "smoothing": True},
            None,
            [
                "inputs are smoothed before --values int8 or int4 are chosen, as --dataset shows "
                "them: without both, smoothing is of no use"
            ],
        ),
        (
            {"method": "magnitude", "values": "int8", "dataset": "x.txt", "smoothing": False},
            None,
            [],
        ),
        (
            {"method": "wanda", "reconstruction": "obs+blockwise", "blockwise": {"steps": 3}},
            None,
            [],
        ),
    ],
)
def test_what_is_of_no_use_is_named(
    changes: dict[str, Any],
    effort: str | None,
    messages: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked_recipe({"model": "m"} | changes, effort=effort)
    assert caplog.messages == messages
