"""What answers wrongly is left out of a model's compilation, unless a user asked for it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.quantization import compilation


def compilation_config(custom_ops: list[str], **options: bool) -> SimpleNamespace:
    return SimpleNamespace(custom_ops=custom_ops, inductor_compile_config=options)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a compilation in the place of the model's that is being built."""

    def build(config: SimpleNamespace, *, latent: bool) -> None:
        whole = SimpleNamespace(compilation_config=config)
        monkeypatch.setattr(compilation, "get_current_vllm_config_or_none", lambda: whole)
        compilation.leave_out_wrong_answers(latent_attention=latent)

    return build


@pytest.mark.parametrize(
    ("asked", "left"),
    [
        (["all"], ["all", "-rotary_embedding"]),
        (["all", "-rotary_embedding"], ["all", "-rotary_embedding"]),
        (["all", "+rotary_embedding"], ["all", "+rotary_embedding"]),
        (["none"], ["none"]),
    ],
)
def test_a_kernel_of_latent_attention_that_nobody_asked_for(
    built: Any, asked: list[str], left: list[str]
) -> None:
    config = compilation_config(asked)
    built(config, latent=True)
    assert config.custom_ops == left


def test_other_attention_keeps_its_kernel(built: Any) -> None:
    config = compilation_config(["all"])
    built(config, latent=False)
    assert config.custom_ops == ["all"]


@pytest.mark.parametrize(
    ("options", "left"), [({}, False), ({"reorder_for_peak_memory": True}, True)]
)
def test_a_pass_that_nobody_asked_for(built: Any, options: dict[str, bool], left: bool) -> None:
    config = compilation_config(["none"], **options)
    built(config, latent=False)
    assert config.inductor_compile_config == {"reorder_for_peak_memory": left}


def test_the_pass_has_that_name() -> None:
    assert torch._inductor.config.reorder_for_peak_memory is True


def test_nothing_changes_on_a_gpu(built: Any) -> None:
    config = compilation_config(["all"])
    with torch.device("meta"):  # any that is no CPU
        built(config, latent=True)
    assert config == compilation_config(["all"])


def test_nothing_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "get_current_vllm_config_or_none", lambda: None)
    compilation.leave_out_wrong_answers(latent_attention=True)


def test_latent_attention_is_told_by_its_rank() -> None:
    assert compilation.has_latent_attention(DeepseekV3Config())
    assert not compilation.has_latent_attention(LlamaConfig())
