"""vLLM's layers without a model, a device or other ranks."""

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding


@pytest.fixture(autouse=True)
def vllm_config() -> Iterator[VllmConfig]:
    """Layers ask for the engine's configuration."""
    configuration = VllmConfig()
    with set_current_vllm_config(configuration):
        yield configuration


@pytest.fixture
def on_rank(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Make layers believe that they are built on a rank of a tensor-parallel group."""

    def set_rank(rank: int, size: int) -> None:
        for module in (linear, parameter, vocab_parallel_embedding):
            monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: size)

    set_rank(0, 1)
    return set_rank
