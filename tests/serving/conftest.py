"""The pruned model that every serving test uses."""

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks.models import smollm2
from tests.serving.checkpoints import Twins, prune


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """SmolLM2-135M with all its linears pruned, sparse and as dense with zeros."""
    return prune(smollm2(), tmp_path_factory.mktemp("twins"))
