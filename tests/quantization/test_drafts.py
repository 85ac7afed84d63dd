"""What is a draft, and that its output head is rounded."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig

from permllm_vllm.quantization import head
from permllm_vllm.quantization.drafts import adapters_reach_model, builds_draft
from permllm_vllm.quantization.options import ServingOptions

HEAD = {"head_dtype": torch.bfloat16, "dtype": torch.bfloat16}


@pytest.fixture
def models(vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Configurations of a target, which is being built, and of its draft."""
    found: dict[str, Any] = {name: SimpleNamespace(**HEAD) for name in ("target", "draft")}
    speculative = SimpleNamespace(
        target_model_config=found["target"], draft_model_config=found["draft"]
    )
    monkeypatch.setattr(vllm_config, "speculative_config", speculative)
    monkeypatch.setattr(vllm_config, "model_config", found["target"])
    return found


def test_nothing_drafts(vllm_config: VllmConfig) -> None:
    assert not builds_draft()


@pytest.mark.parametrize("built", ["target", "draft"])
def test_a_draft_is_told_from_its_target(
    built: str, models: dict[str, Any], vllm_config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_config, "model_config", models[built])
    assert builds_draft() == (built == "draft")
    assert not adapters_reach_model()
    monkeypatch.setattr(vllm_config, "lora_config", SimpleNamespace())
    assert adapters_reach_model() == (built == "target")


def test_what_drafts_by_n_grams_is_no_draft(
    models: dict[str, Any], vllm_config: VllmConfig
) -> None:
    """Then vLLM calls the model itself its draft."""
    speculative: Any = vllm_config.speculative_config
    speculative.draft_model_config = models["target"]
    assert not builds_draft()


@pytest.mark.parametrize(
    ("option", "rounded"),
    [
        (None, {"target": False, "draft": True}),
        ("dense", {"target": False, "draft": False}),
        ("int8", {"target": True, "draft": True}),
    ],
)
@pytest.mark.parametrize("built", ["target", "draft"])
def test_the_head_of_a_draft_is_rounded(
    built: str,
    option: str | None,
    rounded: dict[str, bool],
    models: dict[str, Any],
    on_rank: Callable[[int, int], None],
    vllm_config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless that is not wanted; only who asked for it is told where it cannot be."""
    told: list[str] = []
    monkeypatch.setattr(head.logger, "warning", lambda text, *words: told.append(text % words))
    monkeypatch.setattr(head, "serving_options", lambda: ServingOptions(head=option))
    monkeypatch.setattr(head, "can_round", lambda weight: True)
    monkeypatch.setattr(head, "CpuBackend", lambda: SimpleNamespace(round_dense=lambda weight: "8"))
    monkeypatch.setattr(vllm_config, "model_config", models[built])
    assert (_copy() == "8") == rounded[built]
    monkeypatch.setattr(head, "can_round", lambda weight: False)
    assert _copy() is None
    assert bool(told) == (option == "int8")


def _copy() -> Any:
    """What a head has as its copy."""
    layer = head.ParallelLMHead(8, 8, params_dtype=torch.float32)
    layer.quant_method = head.head_method()
    layer.quant_method.adopt(layer)
    layer.quant_method.process_weights_after_loading(layer)
    return layer.__dict__[head.COPY]
