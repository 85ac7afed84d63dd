"""Mixture-of-experts models: sparse attention is served, experts stay dense or are refused."""

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


@pytest.fixture
def twins(parent: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Twins:
    return prune(parent, tmp_path, ignore=["lm_head", *request.param])


@pytest.mark.parametrize("twins", [[EXPERTS, ROUTER]], indirect=True, ids=["ignored"])
def test_ignored_experts_are_served(engines: Engines, twins: Twins) -> None:
    dense = engines.run(twins.dense, PROMPTS)
    sparse = engines.run(twins.sparse, PROMPTS)
    assert sparse.backends == {"cpu bfloat16": 4}
    assert sparse.tokens() == dense.tokens()
    assert sparse.difference(dense) < TOLERANCE


@pytest.mark.parametrize("twins", [[ROUTER]], indirect=True, ids=["sparse"])
def test_sparse_experts_are_refused(engines: Engines, twins: Twins) -> None:
    with pytest.raises(NotImplementedError, match=r"mixture-of-experts weights .*experts"):
        engines.run(twins.sparse, PROMPTS)
