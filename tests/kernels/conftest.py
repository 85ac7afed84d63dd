import pytest
import torch

from permllm_vllm.backends.cpu import instruction_sets

EVERY_INSTRUCTION_SET = (
    *("amx", "zen5", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "avx512"),
    *("avx2_vnni", "avx2", "portable"),
)


@pytest.fixture(params=EVERY_INSTRUCTION_SET)
def isa(request: pytest.FixtureRequest) -> str:
    """Every path that this CPU runs; the others are skipped with the reason."""
    available = instruction_sets()
    if request.param not in available:
        pytest.skip(f"this CPU or build runs only: {', '.join(available) or 'no compiled kernel'}")
    return request.param


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
