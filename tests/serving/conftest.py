"""The pruned models that serving tests use, and the process that runs engines."""

from collections.abc import Iterator

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from benchmarks.models import smollm2
from tests.serving.checkpoints import Twins, prune, random_llama
from tests.serving.engine import Engines


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """SmolLM2-135M with all its linears pruned, sparse and as dense with zeros."""
    return prune(smollm2(), tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """SmolLM2-135M with every second layer pruned, which leaves it sure of what it says."""
    return prune(smollm2(), tmp_path_factory.mktemp("half"), every=2)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """A random Llama with one KV head, pruned: enough where only vLLM's machinery matters."""
    directory = tmp_path_factory.mktemp("tiny")
    return prune(random_llama(directory / "parent"), directory)


@pytest.fixture(scope="session")
def engines() -> Iterator[Engines]:
    with Engines() as started:
        yield started
