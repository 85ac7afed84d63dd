"""Mixture of experts: sparse ones are multiplied by our kernels, ignored ones by vLLM's."""

from pathlib import Path

import pytest

from tests.serving.checkpoints import Twins, prune, random_mixtral
from tests.serving.engine import PROMPTS, Engines

pytestmark = pytest.mark.serving

TOLERANCE = 1e-4
EXPERTS, ROUTER = r"re:.*\.experts(\..*)?", r"re:.*\.gate"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_mixtral(tmp_path_factory.mktemp("mixtral") / "parent")


@pytest.fixture(scope="module")
def twins(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return prune(parent, tmp_path_factory.mktemp("experts"), ignore=["lm_head", ROUTER])


def test_sparse_experts_are_served(engines: Engines, twins: Twins) -> None:
    dense = engines.run(twins.dense, PROMPTS)
    sparse = engines.run(twins.sparse, PROMPTS)
    assert sparse.backends == {"cpu bfloat16": 4, "experts cpu bfloat16": 2}
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE
