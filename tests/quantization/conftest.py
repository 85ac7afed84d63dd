"""vLLM's layers without a model, a device or other ranks."""

from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear, vocab_parallel_embedding

from permllm_vllm.backends.cpu import instruction_sets
from permllm_vllm.quantization import head
from tests.kernels.cases import TWELVE_BITS


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call that the kernel for a head as it stands took."""
    found: list[int] = []
    kernel = head._head_linear

    def noting(x: Tensor, weight: Tensor) -> Tensor:
        found.append(len(x))
        return kernel(x, weight)

    monkeypatch.setattr(head, "_head_linear", noting)
    return found


@pytest.fixture
def twelve_bit_instruction_set(monkeypatch: pytest.MonkeyPatch) -> str:
    """One that has kernels for copies of heads in 12 bits, which serves from now on."""
    found = [name for name in instruction_sets() if name in TWELVE_BITS]
    if not found:
        pytest.skip("this CPU or build has no kernel for 12 bits")
    monkeypatch.setenv("PERMLLM_CPU_ISA", found[0])
    return found[0]
