"""Options of the plugin in vLLM's --additional-config."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig, set_current_vllm_config

from permllm_vllm.quantization import options
from permllm_vllm.quantization.options import ServingOptions, serving_options


def options_with(given: Any) -> ServingOptions:
    config = VllmConfig()
    config.additional_config = given
    with set_current_vllm_config(config):
        return serving_options()


@pytest.mark.parametrize("given", [{}, {"permllm": {}}, {"another plugin": {"head": 3}}])
def test_nothing_is_asked(given: dict[str, Any]) -> None:
    assert options_with(given) == ServingOptions(head=None)


def test_without_an_engine() -> None:
    assert serving_options() == ServingOptions()


def test_a_head_of_int8() -> None:
    assert options_with({"permllm": {"head": "int8"}}).head == "int8"


@pytest.mark.parametrize(
    ("entries", "what"),
    [
        ({"head": "int4"}, "head: Input should be 'dense' or 'int8'"),
        ({"heads": "int8"}, "heads: Extra inputs are not permitted"),
        ("int8", "permllm: Input should be a valid dictionary"),
    ],
)
def test_what_cannot_be_used(entries: Any, what: str) -> None:
    with pytest.raises(ValueError, match="--additional-config has") as raised:
        options_with({"permllm": entries})
    assert what in str(raised.value)
    assert 'Give {"permllm": {"head": "int8"}}' in str(raised.value)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"permlm": {"head": "int8"}}, ["permlm"]),
        ({"PermLLM": {}, "permllm-vllm": {}}, ["PermLLM", "permllm-vllm"]),
        ({"head": "int8"}, ["head"]),
        ({"permllm": {"head": "int8"}, "ascend_scheduler_config": {}, 3: 4}, []),
    ],
)
def test_what_was_probably_meant_is_told(
    given: dict[Any, Any], told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    logger = SimpleNamespace(warning_once=lambda message, key, meant: seen.append(key))
    monkeypatch.setattr(options, "logger", logger)
    options_with(given)
    assert seen == told
